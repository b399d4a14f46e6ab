// Fiber stacks and the switch between them.
//
// The switch saves callee-saved registers on the old stack and loads them from the new one: ten instructions, no system call, which
// is what makes a thousand CUDA threads a block affordable. AddressSanitizer must be told of every switch.
#include <sys/mman.h>

#include <cstdlib>

#include "runtime.h"
#if EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void rm_emu_switch(void** save, void* load) __attribute__((visibility("hidden")));
#if defined(__x86_64__)
asm(R"(.text
.globl rm_emu_switch
.hidden rm_emu_switch
.type rm_emu_switch,@function
rm_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rm_emu_switch, .-rm_emu_switch
)");
#elif defined(__aarch64__)
asm(R"(.text
.globl rm_emu_switch
.hidden rm_emu_switch
.type rm_emu_switch,%function
rm_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size rm_emu_switch, .-rm_emu_switch
)");
#else
#error "the kernel emulator runs on x86-64 and aarch64; add rm_emu_switch for this architecture"
#endif

namespace emu {

__thread Fiber* cur;
__thread Worker* worker;

unsigned char* map_memory(std::size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<unsigned char*>(p);
}

// Gives a fiber that starts a free stack on which the first switch "returns" into `entry`.
void prepare_stack(Fiber* f, void (*entry)()) {
  f->stack = worker->free_stacks.back();
  worker->free_stacks.pop_back();
  f->stack_size = STACK_BYTES;
  f->asan_fake_stack = nullptr;
#if EMU_ASAN
  __asan_unpoison_memory_region(f->stack, f->stack_size);
#endif
  // Equal offsets in all stacks would make all fibers fight for the same cache sets.
  const std::uintptr_t colour = (std::uintptr_t(f->stack - worker->stacks) / STACK_SLOT % 31) * 128;
  const std::uintptr_t top = (std::uintptr_t(f->stack) + STACK_BYTES - colour) & ~std::uintptr_t(63);
#if defined(__x86_64__)
  void** s = reinterpret_cast<void**>(top);
  *--s = nullptr;
  *--s = reinterpret_cast<void*>(entry);
  s -= 6;
#else
  void** s = reinterpret_cast<void**>(top - 160);
  s[11] = reinterpret_cast<void*>(entry);
#endif
  f->sp = s;
}

#if EMU_ASAN
// The stack of the operating system thread, asked for once: pthread_getattr_np is slow.
struct ThreadStack {
  void* bottom = nullptr;
  std::size_t size = 0;
  ThreadStack() {
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
      pthread_attr_getstack(&attributes, &bottom, &size);
      pthread_attr_destroy(&attributes);
    }
  }
};
static const ThreadStack& thread_stack() {
  static thread_local ThreadStack stack;
  return stack;
}

void fiber_started() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }

void switch_fiber(Fiber* from, Fiber* to) {
  __sanitizer_start_switch_fiber(&from->asan_fake_stack, to->stack, to->stack_size);
  rm_emu_switch(&from->sp, to->sp);
  __sanitizer_finish_switch_fiber(from->asan_fake_stack, nullptr, nullptr);
}

void leave_fiber_for(Fiber* to) {
  void* abandoned;
  __sanitizer_start_switch_fiber(nullptr, to->stack, to->stack_size);
  rm_emu_switch(&abandoned, to->sp);
  __builtin_unreachable();
}

void leave_to_scheduler() {
  void* abandoned;
  __sanitizer_start_switch_fiber(nullptr, thread_stack().bottom, thread_stack().size);
  rm_emu_switch(&abandoned, worker->scheduler_sp);
  __builtin_unreachable();
}

void enter_first_fiber(Fiber* f) {
  void* fake = nullptr;
  thread_stack();
  __sanitizer_start_switch_fiber(&fake, f->stack, f->stack_size);
  rm_emu_switch(&worker->scheduler_sp, f->sp);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
#else
void fiber_started() {}

void switch_fiber(Fiber* from, Fiber* to) { rm_emu_switch(&from->sp, to->sp); }

void leave_fiber_for(Fiber* to) {
  void* abandoned;
  rm_emu_switch(&abandoned, to->sp);
  __builtin_unreachable();
}

void leave_to_scheduler() {
  void* abandoned;
  rm_emu_switch(&abandoned, worker->scheduler_sp);
  __builtin_unreachable();
}

void enter_first_fiber(Fiber* f) { rm_emu_switch(&worker->scheduler_sp, f->sp); }
#endif

}  // namespace emu
