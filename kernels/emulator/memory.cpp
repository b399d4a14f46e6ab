// Device memory: host memory between guard pages, so that an access past the end faults at once.
#include <sys/mman.h>

#include <cstdlib>
#include <unordered_map>

#include "runtime.h"

namespace emu {

struct Mapping {
  unsigned char* start;
  std::size_t bytes;
};

static std::mutex mappings_mutex;
static std::unordered_map<void*, Mapping>& mappings() {
  static auto* m = new std::unordered_map<void*, Mapping>;
  return *m;
}

// In the check build a launch walks the checker's table of buffers, so nobody may change it meanwhile.
class ShadowLock {
 public:
  ShadowLock() {
    if (CHECKING) launch_mutex().lock();
  }
  ~ShadowLock() {
    if (CHECKING) launch_mutex().unlock();
  }
  ShadowLock(const ShadowLock&) = delete;
};

}  // namespace emu

using namespace emu;

void* rm_emu_alloc(std::size_t bytes) {
#if EMU_ASAN
  // Not rounded up: AddressSanitizer finds an access to the first byte past the end.
  void* p = nullptr;
  if (posix_memalign(&p, 16, bytes ? bytes : 1) != 0) return nullptr;
  std::memset(p, POISON, bytes);
  return p;
#else
  const std::size_t body = (bytes + 15) & ~std::size_t(15);
  const std::size_t pages = (body + PAGE - 1) / PAGE * PAGE;
  unsigned char* start = map_memory(pages + 2 * PAGE);
  if (!start) return nullptr;
  mprotect(start, PAGE, PROT_NONE);
  mprotect(start + PAGE + pages, PAGE, PROT_NONE);
  unsigned char* p = start + PAGE + pages - body;
  std::memset(start + PAGE, POISON, pages);
  {
    std::lock_guard<std::mutex> lock(mappings_mutex);
    mappings()[p] = {start, pages + 2 * PAGE};
  }
  ShadowLock lock;
  check_global_alloc(p, bytes);
  return p;
#endif
}

void rm_emu_free(void* p) {
  if (!p) return;
#if EMU_ASAN
  std::free(p);
#else
  {
    ShadowLock lock;
    check_global_free(p);
  }
  Mapping m{};
  {
    std::lock_guard<std::mutex> lock(mappings_mutex);
    auto found = mappings().find(p);
    if (found == mappings().end()) return;
    m = found->second;
    mappings().erase(found);
  }
  munmap(m.start, m.bytes);
#endif
}

void rm_emu_write(void* device, const void* host, std::size_t bytes) {
  std::memcpy(device, host, bytes);
  ShadowLock lock;
  check_global_written_by_host(device, bytes);
}

void rm_emu_read(void* host, const void* device, std::size_t bytes) { std::memcpy(host, device, bytes); }

void rm_emu_fill(void* device, int byte, std::size_t bytes) {
  std::memset(device, byte, bytes);
  ShadowLock lock;
  check_global_written_by_host(device, bytes);
}
