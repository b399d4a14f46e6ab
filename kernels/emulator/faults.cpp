// Faults and endless loops become launch errors, as on a GPU, instead of killing the process or hanging it.
//
// A SIGSEGV or SIGBUS inside a kernel is turned into a call of `fail` on the faulting fiber's own stack (which is abandoned anyway).
// The watchdog interrupts a thread that computes without end the same way, but only outside the runtime, whose state must stay whole;
// a kernel that loops through runtime calls notices in `RuntimeScope`.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <chrono>
#include <condition_variable>
#include <thread>

#include "runtime.h"

namespace emu {

constexpr std::size_t SIGNAL_STACK_BYTES = 64 * 1024, TRAMPOLINE_ROOM = 4096;
static __thread void* fault_address;
static struct sigaction previous_segv, previous_bus, previous_watchdog;

static int watchdog_signal() { return SIGRTMIN + 7; }

[[noreturn]] static void fault_trampoline() {
  fail("illegal address %p (out-of-bounds global or shared access, or stack overflow)", fault_address);
}
[[noreturn]] static void expired_trampoline() {
  RuntimeScope learns_that_time_is_up;
  __builtin_unreachable();
}

// Makes the interrupted fiber continue in `target` on a fresh part of its stack.
static void redirect(void* context, void (*target)()) {
  auto* uc = static_cast<ucontext_t*>(context);
  const std::uintptr_t top = (reinterpret_cast<std::uintptr_t>(cur->stack) + cur->stack_size - TRAMPOLINE_ROOM) & ~std::uintptr_t(15);
#if defined(__x86_64__)
  uc->uc_mcontext.gregs[REG_RIP] = greg_t(reinterpret_cast<std::uintptr_t>(target));
  uc->uc_mcontext.gregs[REG_RSP] = greg_t(top - 8);   // as after a call
#else
  uc->uc_mcontext.pc = reinterpret_cast<std::uintptr_t>(target);
  uc->uc_mcontext.sp = top;
#endif
}

// Not ours: another emulator library's, or somebody else's who was there before.
static void pass_on(const struct sigaction& previous, int signal, siginfo_t* info, void* context) {
  if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else if (signal == SIGSEGV || signal == SIGBUS) {
    sigaction(signal, &previous, nullptr);   // the instruction faults again, and ends the process as it should
  }
}

static void on_fault(int signal, siginfo_t* info, void* context) {
  if (worker && cur) {
    fault_address = info->si_addr;
    redirect(context, &fault_trampoline);
    return;
  }
  pass_on(signal == SIGSEGV ? previous_segv : previous_bus, signal, info, context);
}

static void on_watchdog(int signal, siginfo_t* info, void* context) {
  if (!worker) return pass_on(previous_watchdog, signal, info, context);
  if (cur && !worker->in_runtime) redirect(context, &expired_trampoline);
}

void install_fault_handlers() {
  static const bool once = [] {
    struct sigaction action {};
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    action.sa_sigaction = &on_watchdog;
    sigaction(watchdog_signal(), &action, &previous_watchdog);
    if (!EMU_ASAN) {   // AddressSanitizer reports faults itself, with more detail
      action.sa_flags |= SA_NODEFER;   // the trampoline never returns to the handler's frame
      action.sa_sigaction = &on_fault;
      sigaction(SIGSEGV, &action, &previous_segv);
      sigaction(SIGBUS, &action, &previous_bus);
    }
    return true;
  }();
  (void)once;
}

// A fiber's stack may be exhausted when the signal comes, so handlers need their own; threads of Rust have one already.
void use_alternate_signal_stack() {
  struct Owned {
    void* memory = nullptr;
    ~Owned() {
      if (!memory) return;
      stack_t off{};
      off.ss_flags = SS_DISABLE;
      sigaltstack(&off, nullptr);
      munmap(memory, SIGNAL_STACK_BYTES);
    }
  };
  static thread_local Owned owned;
  stack_t current{};
  if (owned.memory || (sigaltstack(nullptr, &current) == 0 && !(current.ss_flags & SS_DISABLE))) return;
  owned.memory = map_memory(SIGNAL_STACK_BYTES);
  if (!owned.memory) return;
  stack_t stack{};
  stack.ss_sp = owned.memory;
  stack.ss_size = SIGNAL_STACK_BYTES;
  sigaltstack(&stack, nullptr);
}

// ---- watchdog

// One thread that looks at the running launch twenty times a second: launches pay nothing for it.
class Watchdog {
 public:
  Watchdog() {
    std::thread([this] { run(); }).detach();
  }
  void begin(Launch* launch) {
    std::lock_guard<std::mutex> lock(mutex_);
    launch_ = launch;
    started_ = Clock::now();
    if (sleeping_) wake_.notify_one();
  }
  void end() {
    std::lock_guard<std::mutex> lock(mutex_);
    launch_ = nullptr;
  }

 private:
  using Clock = std::chrono::steady_clock;
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      sleeping_ = true;
      wake_.wait(lock, [&] { return launch_ != nullptr; });
      sleeping_ = false;
      while (launch_) {
        if (Clock::now() - started_ > std::chrono::milliseconds(launch_->options.watchdog_ms)) expire(*launch_);
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        lock.lock();
      }
    }
  }
  // Repeated until the launch is over: a signal that arrives inside the runtime is ignored.
  static void expire(Launch& launch) {
    launch.expired = true;
    std::lock_guard<std::mutex> lock(launch.mutex);
    for (pthread_t thread : launch.running) pthread_kill(thread, watchdog_signal());
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  Launch* launch_ = nullptr;
  Clock::time_point started_;
  bool sleeping_ = false;
};

static Watchdog& watchdog() {
  static Watchdog* w = new Watchdog;
  return *w;
}

Watch::Watch(Launch& launch) { watchdog().begin(&launch); }
Watch::~Watch() { watchdog().end(); }

}  // namespace emu
