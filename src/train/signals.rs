//! SIGINT and SIGTERM: the first asks the run to finish its step, save and leave; the second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

use crate::error::{Error, Result};

/// Whether the run was asked to stop, and by which signal.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicUsize>);

impl Stop {
    /// Takes over SIGINT and SIGTERM of the process. Also keeps SIGXFSZ from ending it, so that a file size limit becomes an
    /// ordinary write error.
    pub fn install() -> Result<Stop> {
        let stop = Stop::default();
        let again = Arc::new(AtomicBool::new(false));
        let register = |signal: i32| -> std::io::Result<()> {
            // Handlers run in the order of registration: on the first signal `again` is still false, so the process goes on.
            flag::register_conditional_shutdown(signal, 128 + signal, again.clone())?;
            flag::register(signal, again.clone())?;
            flag::register_usize(signal, stop.0.clone(), signal as usize)?;
            Ok(())
        };
        let ignored = flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).map(drop);
        register(SIGINT)
            .and_then(|()| register(SIGTERM))
            .and(ignored)
            .map_err(|e| Error::io("signals", "cannot install the handlers", &e))?;
        Ok(stop)
    }

    /// The signal that asked the run to stop, if one did.
    pub fn requested(&self) -> Option<i32> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(signal as i32),
        }
    }

    /// Asks the run to stop as if `signal` had arrived.
    pub fn request(&self, signal: i32) {
        self.0.store(signal as usize, Ordering::Relaxed);
    }
}

/// The usual name of a stop signal.
pub fn name(signal: i32) -> &'static str {
    match signal {
        SIGINT => "SIGINT",
        SIGTERM => "SIGTERM",
        _ => "a signal",
    }
}
