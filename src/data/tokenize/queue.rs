//! A budget of bytes shared by the threads of a pipeline.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes that may be under way at once.
pub struct Budget {
    total: usize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    used: usize,
    closed: bool,
}

impl Budget {
    /// A budget of `total` bytes.
    pub fn new(total: usize) -> Budget {
        Budget { total, state: Mutex::new(State { used: 0, closed: false }), changed: Condvar::new() }
    }

    /// Waits until `bytes` fit, or until nothing else is under way. False once closed.
    pub fn take(&self, bytes: usize) -> bool {
        let mut state = self.lock();
        while !state.closed && state.used > 0 && state.used + bytes > self.total {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.used += bytes;
        !state.closed
    }

    /// Gives `bytes` back.
    pub fn give(&self, bytes: usize) {
        self.lock().used -= bytes;
        self.changed.notify_all();
    }

    /// Ends all waiting.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// The state is two plain values, valid even if a thread died while holding it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
