// The `check` build's race and initialisation checker. Kernels compiled with -fsanitize=thread call the `__tsan_*` functions at the end
// of this file for each access to memory; the runtime calls `check_access` for what its primitives read and write.
//
// A write by lane A and an access by lane B are ordered when A's epoch is known to B's warp through a barrier, or both are in one warp
// and a `__syncwarp` lies between. Anything else that touches the same byte, one of them writing, is reported with both threads.
#if EMU_CHECK
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>

#include "runtime.h"

namespace emu {

enum class State : std::uint8_t { Untouched, Written, InFlight };

// Lanes of one warp that accessed a byte in one epoch.
struct Access {
  std::uint32_t epoch, lanes;   // lanes == 0: none
  std::int32_t warp;
};
constexpr int READERS = 4;
struct Cell {
  std::uint32_t generation;
  State state;
  bool generic;   // written by ordinary stores, which wgmma sees only after a proxy fence
  std::uint8_t next_reader;
  std::uint16_t writer_thread;
  Access writer, readers[READERS];
};

static __thread void* instruction;   // of the instrumented access under way; null inside primitives

static std::string location() {
  Dl_info info;
  if (!instruction || !dladdr(instruction, &info)) return {};
  char command[600], line[400] = "";
  const auto offset = static_cast<const char*>(instruction) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof command, "addr2line -ie '%s' %#lx 2>/dev/null", info.dli_fname, static_cast<unsigned long>(offset));
  FILE* f = popen(command, "r");
  if (!f) return {};
  const bool read = std::fgets(line, sizeof line, f) != nullptr;
  pclose(f);
  line[std::strcspn(line, "\n")] = 0;
  return read ? std::string(", at ") + line : std::string();
}

// `fail` never returns to the caller's frame, so the text is copied out of the string first.
[[noreturn]] static void report(const char* what, std::uint32_t offset, const std::string& more) {
  char text[1200];
  const Worker& w = *worker;
  char place[80];
  if (offset >= w.dynamic_offset) {
    std::snprintf(place, sizeof place, "dynamic shared memory +0x%x", offset - w.dynamic_offset);
  } else {
    std::snprintf(place, sizeof place, "static shared memory at 0x%x", offset);
  }
  std::snprintf(text, sizeof text, "%s: %s%s%s", what, place, more.c_str(), location().c_str());
  instruction = nullptr;
  fail("%s", text);
}

static std::string with_thread(int warp, std::uint32_t lanes) {
  return ", with thread " + std::to_string(warp * WARP_SIZE + __builtin_ctz(lanes));
}

// Lanes of `a` whose access is not ordered before the current thread's.
static inline __attribute__((always_inline)) std::uint32_t unordered(const Access& a) {
  if (a.lanes == 0) return 0;
  const Warp& me = *cur->warp;
  if (a.warp == me.id) return a.epoch < me.clock.epoch[me.id] ? 0 : a.lanes & ~(1u << cur->lane);
  return a.epoch <= me.clock.epoch[a.warp] ? 0 : a.lanes;
}

static inline Cell& cell_at(std::size_t offset) {
  Cell& c = worker->shadow.cells[offset];
  if (c.generation != worker->shadow.generation) {
    c = Cell{};
    c.generation = worker->shadow.generation;
  }
  return c;
}

static inline Access this_access() { return {cur->warp->clock.epoch[cur->warp->id], 1u << cur->lane, cur->warp->id}; }

static void add_reader(Cell& c) {
  const Access me = this_access();
  for (Access& r : c.readers) {
    if (r.lanes != 0 && r.warp == me.warp) {
      // An older epoch is ordered before this read, so whoever is ordered after this one is ordered after that one.
      r.lanes = r.epoch == me.epoch ? r.lanes | me.lanes : me.lanes;
      r.epoch = me.epoch;
      return;
    }
  }
  for (Access& r : c.readers) {
    if (r.lanes == 0 || unordered(r) == 0) {
      r = me;
      return;
    }
  }
  c.readers[c.next_reader++ % READERS] = me;
}

static void check_shared(std::size_t first, std::size_t bytes, bool write) {
  if (!shared_valid(std::uint32_t(first), std::uint32_t(bytes)))
    report(write ? "shared write out of bounds" : "shared read out of bounds", std::uint32_t(first), "");
  for (std::size_t offset = first; offset < first + bytes; offset++) {
    Cell& c = cell_at(offset);
    const auto at = std::uint32_t(offset);
    if (c.state == State::InFlight)
      report(write ? "write during an asynchronous copy" : "read during an asynchronous copy", at,
             ", copy issued by thread " + std::to_string(c.writer_thread));
    if (const std::uint32_t lanes = unordered(c.writer))
      report(write ? "race (write after write)" : "race (read after write)", at, with_thread(c.writer.warp, lanes));
    if (!write) {
      if (c.state == State::Untouched) report("read of uninitialised shared memory", at, "");
      add_reader(c);
      continue;
    }
    for (Access& r : c.readers) {
      if (const std::uint32_t lanes = unordered(r)) report("race (write after read)", at, with_thread(r.warp, lanes));
      r.lanes = 0;
    }
    c.state = State::Written;
    c.generic = true;
    c.writer = this_access();
    c.writer_thread = std::uint16_t(cur->id);
  }
}

void check_async_begin(std::uint32_t shared, std::uint32_t bytes) {
  for (std::uint32_t i = 0; i < bytes; i++) {
    Cell& c = cell_at(shared + i);
    c.state = State::InFlight;
    c.generic = false;
    c.writer_thread = std::uint16_t(cur->id);
  }
}

void check_async_end(std::uint32_t shared, std::uint32_t bytes, int thread, std::uint32_t epoch) {
  for (std::uint32_t i = 0; i < bytes; i++) {
    Cell& c = cell_at(shared + i);
    c.state = State::Written;
    c.generic = false;
    c.writer = {epoch, 1u << thread % WARP_SIZE, thread / WARP_SIZE};
    c.writer_thread = std::uint16_t(thread);
  }
}

void check_proxy_fence() { worker->shadow.proxy_fence[cur->id] = cur->warp->clock.epoch[cur->warp->id]; }

void check_proxy_read(std::uint32_t shared, const char* operand) {
  const Cell& c = cell_at(shared);
  if (!c.generic || worker->shadow.proxy_fence[c.writer_thread] >= c.writer.epoch) return;
  report("wgmma reads ordinary stores without fence.proxy.async", shared,
         std::string(", operand ") + operand + ", stored by thread " + std::to_string(c.writer_thread));
}

void check_block_start() {
  Shadow& s = worker->shadow;
  if (!s.cells) s.cells = reinterpret_cast<Cell*>(map_memory(ARENA_BYTES * sizeof(Cell)));
  if (!s.cells) fail("the checker cannot map its shadow memory");
  s.generation++;
  std::memset(s.proxy_fence, 0, sizeof s.proxy_fence);
}

// ---- global memory: races between blocks, reads of what nobody wrote

// Block that last wrote and read the byte, and in which launch. HOST in `write_launch`: written by a copy or fill.
struct GlobalCell {
  std::uint32_t write_launch, write_block, read_launch, read_block;
};
constexpr std::uint32_t HOST = ~0u, SEVERAL_BLOCKS = ~0u;

struct GlobalBuffer {
  const unsigned char* start;
  std::size_t bytes;
  GlobalCell* cells;
  bool holds(const unsigned char* p) const { return std::size_t(p - start) < bytes; }
};

// Sorted by address.
static std::vector<GlobalBuffer>& buffers() {
  static auto* b = new std::vector<GlobalBuffer>;
  return *b;
}
static __thread std::size_t last_buffer;

static GlobalBuffer* buffer_at(const unsigned char* p) {
  std::vector<GlobalBuffer>& all = buffers();
  if (last_buffer < all.size() && all[last_buffer].holds(p)) return &all[last_buffer];
  auto after = std::upper_bound(all.begin(), all.end(), p, [](const unsigned char* q, const GlobalBuffer& b) { return q < b.start; });
  if (after == all.begin() || !(after - 1)->holds(p)) return nullptr;
  last_buffer = std::size_t(after - 1 - all.begin());
  return &all[last_buffer];
}

void check_global_alloc(const void* p, std::size_t bytes) {
  auto* cells = reinterpret_cast<GlobalCell*>(map_memory((bytes + 1) * sizeof(GlobalCell)));
  if (!cells) return;
  const GlobalBuffer b{static_cast<const unsigned char*>(p), bytes, cells};
  std::vector<GlobalBuffer>& all = buffers();
  const auto before = [](const GlobalBuffer& x, const GlobalBuffer& y) { return x.start < y.start; };
  all.insert(std::upper_bound(all.begin(), all.end(), b, before), b);
}

void check_global_free(const void* p) {
  std::vector<GlobalBuffer>& all = buffers();
  const auto found = std::find_if(all.begin(), all.end(), [p](const GlobalBuffer& b) { return b.start == p; });
  if (found == all.end()) return;
  munmap(found->cells, (found->bytes + 1) * sizeof(GlobalCell));
  all.erase(found);
}

void check_global_written_by_host(const void* p, std::size_t bytes) {
  const auto* start = static_cast<const unsigned char*>(p);
  GlobalBuffer* b = bytes ? buffer_at(start) : nullptr;
  if (!b) return;
  for (std::size_t i = std::size_t(start - b->start), end = i + bytes; i < end; i++) b->cells[i].write_launch = HOST;
}

[[noreturn]] static void report_global(const char* what, const GlobalBuffer& b, std::size_t at, const std::string& more) {
  char text[1200];
  std::snprintf(text, sizeof text, "%s: byte %zu of a buffer of %zu bytes%s%s", what, at, b.bytes, more.c_str(), location().c_str());
  instruction = nullptr;
  fail("%s", text);
}

static void check_global(const unsigned char* p, std::size_t bytes, bool write) {
  GlobalBuffer* b = buffer_at(p);
  if (!b) return;
  const std::size_t first = std::size_t(p - b->start);
  if (first + bytes > b->bytes) report_global("global access across the end of a buffer", *b, first, "");
  const Block& block = worker->block;
  const std::uint32_t me = block.index.x + block.grid.x * (block.index.y + block.grid.y * block.index.z), launch = worker->launch->id;
  for (std::size_t i = first; i < first + bytes; i++) {
    GlobalCell& c = b->cells[i];
    if (c.write_launch == launch && c.write_block != me)
      report_global(write ? "race between blocks (write after write)" : "race between blocks (read after write)", *b, i,
                    ", written by block " + std::to_string(c.write_block) + " in this launch");
    if (!write) {
      if (c.write_launch == 0) report_global("read of uninitialised global memory", *b, i, "");
      c.read_block = c.read_launch == launch && c.read_block != me ? SEVERAL_BLOCKS : me;
      c.read_launch = launch;
      continue;
    }
    if (c.read_launch == launch && c.read_block != me)
      report_global("race between blocks (write after read)", *b, i,
                    c.read_block == SEVERAL_BLOCKS ? ", read by several blocks in this launch"
                                                   : ", read by block " + std::to_string(c.read_block) + " in this launch");
    c.write_launch = launch;
    c.write_block = me;
  }
}

void check_access(const void* p, std::size_t bytes, bool write) {
  if (!worker || !cur) return;
  const auto* address = static_cast<const unsigned char*>(p);
  if (std::size_t(address - cur->stack) < cur->stack_size) return;
  const std::size_t shared = std::size_t(address - worker->arena);
  if (shared < ARENA_BYTES) {
    check_shared(shared, bytes, write);
  } else {
    check_global(address, bytes, write);
  }
}

static void instrumented(void* p, std::size_t bytes, bool write, void* at) {
  if (!worker || !cur || worker->in_runtime) return;
  RuntimeScope scope;
  instruction = at;
  check_access(p, bytes, write);
  instruction = nullptr;
}

}  // namespace emu

// What -fsanitize=thread calls. The real thread sanitizer is not linked.
#define HOOKS(N)                                                                                                                  \
  void __tsan_read##N(void* p) { emu::instrumented(p, N, false, __builtin_return_address(0)); }                                  \
  void __tsan_write##N(void* p) { emu::instrumented(p, N, true, __builtin_return_address(0)); }                                  \
  void __tsan_unaligned_read##N(void* p) { emu::instrumented(p, N, false, __builtin_return_address(0)); }                        \
  void __tsan_unaligned_write##N(void* p) { emu::instrumented(p, N, true, __builtin_return_address(0)); }                        \
  void __tsan_read_write##N(void* p) {                                                                                           \
    emu::instrumented(p, N, false, __builtin_return_address(0));                                                                 \
    emu::instrumented(p, N, true, __builtin_return_address(0));                                                                  \
  }
extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, std::size_t n) { emu::instrumented(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, std::size_t n) { emu::instrumented(p, n, true, __builtin_return_address(0)); }
void* __tsan_memcpy(void* d, const void* s, std::size_t n) {
  emu::instrumented(const_cast<void*>(s), n, false, __builtin_return_address(0));
  emu::instrumented(d, n, true, __builtin_return_address(0));
  return std::memcpy(d, s, n);
}
void* __tsan_memset(void* d, int c, std::size_t n) {
  emu::instrumented(d, n, true, __builtin_return_address(0));
  return std::memset(d, c, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}
#endif
