// How a kernel entry point becomes something the launcher can call: `RM_EXPORT(name)` defines the symbol `rm_emu_kernel_<name>`.
//
// A plain symbol instead of a run-time registry: the linker proves that every kernel with a launch stub exists, nothing depends on
// static initialisers surviving in an archive, and a library built for a test is searched with `dlsym`.
#pragma once
#include <cstdint>
#include <utility>

namespace emu {

struct Kernel {
  const char* name;
  void (*invoke)(void** params);
  std::uint32_t count;
  const std::uint32_t* sizes;
};

template <auto F> struct Trampoline;
template <class... A, void (*F)(A...)> struct Trampoline<F> {
  static constexpr std::uint32_t sizes[sizeof...(A) + 1] = {sizeof(A)..., 0};
  static constexpr std::uint32_t count = sizeof...(A);
  template <std::size_t... I> static void call(void** p, std::index_sequence<I...>) { F(*static_cast<A*>(p[I])...); }
  static void invoke(void** p) { call(p, std::index_sequence_for<A...>{}); }
};

}  // namespace emu

#define RM_EXPORT(fn)                                                                                      \
  extern "C" {                                                                                             \
  extern const ::emu::Kernel rm_emu_kernel_##fn __attribute__((visibility("default")));                    \
  const ::emu::Kernel rm_emu_kernel_##fn = {#fn, &::emu::Trampoline<&fn>::invoke, ::emu::Trampoline<&fn>::count, \
                                            ::emu::Trampoline<&fn>::sizes};                                \
  }
#define RM_EXPORT_HOT(fn) RM_EXPORT(fn)

#define RM_DYN_SMEM(name) unsigned char* name = static_cast<unsigned char*>(::emu::dynamic_shared())
#define RM_SHARED(T, name, N)            \
  static const char emu_tag_##name = 0;  \
  T(&name)[N] = *static_cast<T(*)[N]>(::emu::static_shared(&emu_tag_##name, sizeof(T) * (N), alignof(T)))
