// A CUDA driver and a cuBLASLt without a GPU, for tests of the device layer: one library under both names.
//
// Device memory is host memory. Work is kept in a list for each stream and done only when it is waited for, as late as a real queue may
// do it, and every address is checked. Kernels do nothing, except conformance_reductions, which writes in[0] + 1 to out[0]. Products
// are computed column by column, as cuBLASLt's manual defines them.
//
// Of two streams only events tell which work comes first. Where one stream touches what a second one works on, and no event puts one
// behind the other, the call that queues it fails. What a kernel touches is taken to be where its pointers point.
//
// What it is and what fails is told by variables:
//   FAKE_LOG         file to which every call is appended, one a line, with what matters of its arguments
//   FAKE_VERSION     version of the driver, 13000        FAKE_LIBRARY    version of cuBLASLt, 130100
//   FAKE_GPUS        number of GPUs, 1                   FAKE_CAPABILITY 90 for 9.0
//   FAKE_MEMORY      bytes of device memory, 1 GiB       FAKE_SHARED     bytes of shared memory a block, 232448
//   FAKE_FAIL        function:code[:calls that still succeed]
//   FAKE_LATE        kernel:code, which comes out where the kernel is waited for
//   FAKE_ALGORITHMS  number:milliseconds, as the library proposes them, 77:1 alone; products are logged with others than 77
//   FAKE_BROKEN      number of an algorithm that is proposed and does not run
//   FAKE_PARAMETERS  file that says how many parameters kernels have
//   FAKE_SLOW        milliseconds that waiting for an event takes
//   FAKE_EARLY       streams but the first do their work as soon as it is queued, and not as late as possible
//   FAKE_UNORDERED   streams do not wait for each other's events: waits the driver does not hear of; 2: and it fails no work for that

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

namespace {

struct Range {
  uint64_t from, to;
};

struct Task {
  std::function<int()> run;
  std::vector<Range> touches;
};

struct Stream {
  int id;
  std::deque<Task> pending;
  uint64_t queued = 0, finished = 0;
  // Milliseconds that all work queued so far takes.
  double work_ms = 0;
  // Up to which work of each stream what is queued now comes behind.
  std::map<int, uint64_t> behind;
};

// Work of a stream but the first, and what it works on.
struct Side {
  Range range;
  int stream;
  uint64_t ticket;
};

std::vector<Stream*> streams;
std::vector<Side> side_work;
std::vector<std::pair<uint64_t, Range>> first_work;
std::vector<Task>* recording = nullptr;
int sticky = 0;
std::map<uint64_t, size_t> memory;
size_t used = 0;

uint64_t number(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

void log(const char* format, ...) {
  const char* path = std::getenv("FAKE_LOG");
  std::FILE* file = path ? std::fopen(path, "a") : nullptr;
  if (!file) return;
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(file, format, arguments);
  va_end(arguments);
  std::fputc('\n', file);
  std::fclose(file);
}

// The code that FAKE_FAIL asks this call to fail with.
int fails(const char* function) {
  static uint64_t left = 0;
  static bool counted = false;
  const char* text = std::getenv("FAKE_FAIL");
  const size_t length = std::strlen(function);
  if (!text || std::strncmp(text, function, length) != 0 || text[length] != ':') return 0;
  char* rest = nullptr;
  const int code = static_cast<int>(std::strtol(text + length + 1, &rest, 10));
  if (!counted) left = *rest == ':' ? std::strtoull(rest + 1, nullptr, 10) : 0;
  counted = true;
  if (left > 0) return --left, 0;
  return code;
}

int run_until(Stream& stream, uint64_t ticket) {
  while (stream.finished < ticket && sticky == 0) {
    Task task = std::move(stream.pending.front());
    stream.pending.pop_front();
    sticky = task.run();
    stream.finished += 1;
  }
  return sticky;
}

bool overlap(Range a, Range b) { return a.from < b.to && b.from < a.to; }

// Whether work of `stream` that touches `range` may run at the same time as what another one does there.
bool races(Stream& stream, Range range) {
  if (stream.id > 1) {
    for (const auto& [ticket, other] : first_work) {
      if (ticket > stream.behind[1] && overlap(range, other)) return true;
    }
  }
  for (const Side& other : side_work) {
    if (other.stream != stream.id && other.ticket > stream.behind[other.stream] && overlap(range, other.range)) return true;
  }
  return false;
}

int submit(void* handle, Task task, double ms = 1) {
  auto& stream = *static_cast<Stream*>(handle);
  if (recording && stream.id == 1) {
    recording->push_back(std::move(task));
    return 0;
  }
  const uint64_t ticket = stream.queued + 1;
  for (const Range& range : task.touches) {
    if (number("FAKE_UNORDERED", 0) < 2 && races(stream, range)) {
      log("race of stream %d", stream.id);
      return 719;
    }
    // What is told of the first stream grows with a run, and is only asked for by others.
    if (stream.id > 1) side_work.push_back({range, stream.id, ticket});
    else if (streams.size() > 1) first_work.emplace_back(ticket, range);
  }
  stream.pending.push_back(std::move(task));
  stream.queued = ticket;
  stream.work_ms += ms;
  return stream.id > 1 && number("FAKE_EARLY", 0) ? run_until(stream, ticket) : 0;
}

bool inside(uint64_t address, size_t bytes) {
  auto next = memory.upper_bound(address);
  if (next == memory.begin()) return false;
  --next;
  return address + bytes <= next->first + next->second;
}

struct Function {
  std::string name;
  unsigned allowed, parameters;
};

struct Event {
  Stream* stream;
  uint64_t ticket;
  double at_ms;
  std::map<int, uint64_t> behind;
};

// Forgets work that every stream is behind.
void forget() {
  if (streams.size() < 2) return;
  const uint64_t first = streams[1]->behind[1], second = streams[0]->behind[2];
  std::vector<std::pair<uint64_t, Range>> left;
  for (const auto& one : first_work) if (one.first > first) left.push_back(one);
  first_work.swap(left);
  std::vector<Side> side;
  for (const Side& one : side_work) if (one.ticket > second) side.push_back(one);
  side_work.swap(side);
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))
#define CALL(name)                       \
  do {                                   \
    log(#name);                          \
    if (int code = fails(#name)) return code; \
  } while (0)
#define CALL_WITH(name, ...)             \
  do {                                   \
    log(#name " " __VA_ARGS__);          \
    if (int code = fails(#name)) return code; \
  } while (0)

API int cuDriverGetVersion(int* version) {
  CALL(cuDriverGetVersion);
  *version = static_cast<int>(number("FAKE_VERSION", 13000));
  return 0;
}

API int cuGetErrorString(int, const char** text) {
  *text = "what the fake was told to say";
  return 0;
}

API int cuInit(unsigned) { CALL(cuInit); return 0; }

API int cuDeviceGetCount(int* count) {
  CALL(cuDeviceGetCount);
  *count = static_cast<int>(number("FAKE_GPUS", 1));
  return 0;
}

API int cuDeviceGet(int* device, int ordinal) { CALL_WITH(cuDeviceGet, "%d", ordinal); *device = ordinal; return 0; }

API int cuDeviceGetName(char* name, int length, int) {
  CALL(cuDeviceGetName);
  std::snprintf(name, static_cast<size_t>(length), "Fake GPU");
  return 0;
}

API int cuDeviceGetAttribute(int* value, int which, int) {
  CALL(cuDeviceGetAttribute);
  const int capability = static_cast<int>(number("FAKE_CAPABILITY", 90));
  switch (which) {
    case 16: *value = 4; return 0;
    case 75: *value = capability / 10; return 0;
    case 76: *value = capability % 10; return 0;
    case 97: *value = static_cast<int>(number("FAKE_SHARED", 232448)); return 0;
  }
  return 1;
}

API int cuDeviceTotalMem_v2(size_t* bytes, int) {
  CALL(cuDeviceTotalMem_v2);
  *bytes = number("FAKE_MEMORY", 1 << 30);
  return 0;
}

API int cuDevicePrimaryCtxRetain(void** context, int) {
  CALL(cuDevicePrimaryCtxRetain);
  *context = reinterpret_cast<void*>(0x10);
  return 0;
}

// Called before everything else, so not worth a line.
API int cuCtxSetCurrent(void*) { return fails("cuCtxSetCurrent"); }

API int cuStreamCreate(void** stream, unsigned flags) {
  CALL_WITH(cuStreamCreate, "%u", flags);
  streams.push_back(new Stream{static_cast<int>(streams.size()) + 1, {}, 0, 0, 0, {}});
  *stream = streams.back();
  return 0;
}

API int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  CALL_WITH(cuStreamCreateWithPriority, "%u %d", flags, priority);
  streams.push_back(new Stream{static_cast<int>(streams.size()) + 1, {}, 0, 0, 0, {}});
  *stream = streams.back();
  return 0;
}

API int cuStreamSynchronize(void* handle) {
  CALL(cuStreamSynchronize);
  auto& stream = *static_cast<Stream*>(handle);
  return recording && stream.id == 1 ? 900 : run_until(stream, stream.queued);
}

API int cuStreamWaitEvent(void* handle, void* event, unsigned) {
  auto& stream = *static_cast<Stream*>(handle);
  const Event& e = *static_cast<Event*>(event);
  CALL_WITH(cuStreamWaitEvent, "%d for %d", stream.id, e.stream->id);
  if (recording) return 900;
  if (number("FAKE_UNORDERED", 0)) return 0;
  auto& seen = stream.behind[e.stream->id];
  seen = std::max(seen, e.ticket);
  for (const auto& [id, ticket] : e.behind) stream.behind[id] = std::max(stream.behind[id], ticket);
  forget();
  return submit(handle, {[=] { return run_until(*e.stream, e.ticket); }, {}}, 0);
}

// For libraries that queue work of their own on `bytes` bytes from `at` on.
API int fake_submit(void* stream, int (*work)(void*), void* data, uint64_t at, size_t bytes) {
  if (recording && static_cast<Stream*>(stream)->id == 1) return 900;
  return submit(stream, {[=] { return work(data); }, {{at, at + bytes}}});
}

API int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  CALL_WITH(cuMemAlloc_v2, "%zu", bytes);
  if (used + bytes > number("FAKE_MEMORY", 1 << 30)) return 2;
  void* start = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  // What nobody has written is NaN.
  std::memset(start, 0xff, bytes);
  *address = reinterpret_cast<uint64_t>(start);
  memory[*address] = bytes;
  used += bytes;
  return 0;
}

bool is_busy() {
  for (const Stream* stream : streams) if (stream->finished < stream->queued) return true;
  return false;
}

API int cuMemFree_v2(uint64_t address) {
  CALL_WITH(cuMemFree_v2, "%s", recording || is_busy() ? "early" : "");
  auto found = memory.find(address);
  if (found == memory.end()) return 1;
  used -= found->second;
  memory.erase(found);
  std::free(reinterpret_cast<void*>(address));
  return 0;
}

API int cuMemGetInfo_v2(size_t* free, size_t* total) {
  CALL(cuMemGetInfo_v2);
  *total = number("FAKE_MEMORY", 1 << 30);
  *free = *total - used;
  return 0;
}

API int cuMemHostAlloc(void** start, size_t bytes, unsigned) {
  CALL_WITH(cuMemHostAlloc, "%zu", bytes);
  *start = std::malloc(bytes);
  return 0;
}

API int cuMemFreeHost(void* start) { CALL(cuMemFreeHost); std::free(start); return 0; }

API int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  CALL_WITH(cuMemcpyHtoDAsync_v2, "%zu", bytes);
  if (recording || !inside(to, bytes)) return 1;
  return submit(stream, {[=] { return std::memcpy(reinterpret_cast<void*>(to), from, bytes), 0; }, {{to, to + bytes}}});
}

API int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  CALL_WITH(cuMemcpyDtoHAsync_v2, "%zu", bytes);
  if (recording || !inside(from, bytes)) return 1;
  return submit(stream, {[=] { return std::memcpy(to, reinterpret_cast<void*>(from), bytes), 0; }, {{from, from + bytes}}});
}

API int cuMemsetD8Async(uint64_t at, unsigned char byte, size_t bytes, void* stream) {
  CALL_WITH(cuMemsetD8Async, "%zu", bytes);
  if (!inside(at, bytes)) return 1;
  return submit(stream, {[=] { return std::memset(reinterpret_cast<void*>(at), byte, bytes), 0; }, {{at, at + bytes}}});
}

API int cuMemsetD2D8Async(uint64_t at, size_t pitch, unsigned char byte, size_t width, size_t height, void* stream) {
  CALL_WITH(cuMemsetD2D8Async, "%zu x %zu", height, width);
  if (pitch < width || !inside(at, (height - 1) * pitch + width)) return 1;
  const auto fill = [=] {
    for (size_t row = 0; row < height; ++row) std::memset(reinterpret_cast<void*>(at + row * pitch), byte, width);
    return 0;
  };
  return submit(stream, {fill, {{at, at + (height - 1) * pitch + width}}});
}

// The bytes of machine code, a file that ends with its table of sections; nothing of anything else.
std::string machine_code(const char* image) {
  if (std::strncmp(image, "\177ELF", 4) != 0) return "";
  uint64_t sections = 0;
  uint16_t entry = 0, count = 0;
  std::memcpy(&sections, image + 0x28, 8);
  std::memcpy(&entry, image + 0x3a, 2);
  std::memcpy(&count, image + 0x3c, 2);
  return std::string(image, sections + uint64_t(entry) * count);
}

API int cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
  const char* text = static_cast<const char*>(image);
  const std::string code = machine_code(text);
  const char* target = code.empty() ? std::strstr(text, ".target ") : nullptr;
  const std::string line = !code.empty() ? "machine code" : target ? std::string(target, std::strcspn(target, ",\n")) : "no target";
  log("cuModuleLoadDataEx %s", line.c_str());
  if (!code.empty() && number("FAKE_OLD", 0)) return 209;
  if (int failed = fails("cuModuleLoadDataEx")) {
    for (unsigned i = 0; i < count; ++i) {
      if (options[i] == 5) std::strcpy(static_cast<char*>(values[i]), "ptxas fatal :\n  no such instruction\n");
    }
    return failed;
  }
  *module = new std::string(code.empty() ? text : code);
  return 0;
}

// As FAKE_PARAMETERS says, a kernel and its number a line; 0 without.
unsigned parameters_of(const std::string& name) {
  const char* path = std::getenv("FAKE_PARAMETERS");
  std::ifstream lines(path ? path : "");
  std::string kernel;
  for (unsigned count = 0; lines >> kernel >> count;) if (kernel == name) return count;
  return 0;
}

API int cuModuleGetFunction(void** function, void* module, const char* name) {
  CALL_WITH(cuModuleGetFunction, "%s", name);
  const std::string& image = *static_cast<std::string*>(module);
  const std::string entry = std::string(".entry ") + name + "(", section = std::string(".text.") + name + '\0';
  if (image.find(entry) == std::string::npos && image.find(section) == std::string::npos) return 500;
  *function = new Function{name, 0, parameters_of(name)};
  return 0;
}

API int cuTensorMapEncodeTiled(void*, int, unsigned rank, void*, const void*, const void*, const void*, const void*, int, int, int, int) {
  CALL_WITH(cuTensorMapEncodeTiled, "%u", rank);
  return 0;
}

API int cuFuncGetAttribute(int* value, int which, void*) {
  CALL_WITH(cuFuncGetAttribute, "%d", which);
  *value = 0;
  return 0;
}

API int cuFuncSetAttribute(void* function, int which, int value) {
  CALL_WITH(cuFuncSetAttribute, "%d %d", which, value);
  if (which != 8 || value > static_cast<int>(number("FAKE_SHARED", 232448))) return 1;
  static_cast<Function*>(function)->allowed = static_cast<unsigned>(value);
  return 0;
}

// Where a kernel's pointers point.
std::vector<Range> pointers(const Function& function, void** params) {
  std::vector<Range> all;
  for (unsigned i = 0; i < function.parameters; ++i) {
    uint64_t value = 0;
    std::memcpy(&value, params[i], 8);
    if (inside(value, 1)) all.push_back({value, value + 1});
  }
  return all;
}

API int cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared, void* stream, void** params, void**) {
  auto* function = static_cast<Function*>(handle);
  CALL_WITH(cuLaunchKernel, "%s %u %u %u, %u %u %u, %u", function->name.c_str(), gx, gy, gz, bx, by, bz, shared);
  if (gx * gy * gz == 0 || (shared > 49152 && shared > function->allowed)) return 1;
  const char* late = std::getenv("FAKE_LATE");
  const std::string prefix = function->name + ":";
  if (late && prefix.compare(0, prefix.size(), late, prefix.size()) == 0) {
    const int code = std::atoi(late + prefix.size());
    return submit(stream, {[=] { return code; }, {}});
  }
  const std::vector<Range> touched = pointers(*function, params);
  if (function->name != "conformance_reductions") return submit(stream, {[] { return 0; }, touched});
  auto* out = *static_cast<float**>(params[0]);
  auto* in = *static_cast<float**>(params[1]);
  return submit(stream, {[=] { return *out = *in + 1, 0; }, touched});
}

API int cuStreamBeginCapture_v2(void*, int mode) {
  CALL_WITH(cuStreamBeginCapture_v2, "%d", mode);
  recording = new std::vector<Task>;
  return 0;
}

API int cuStreamEndCapture(void*, void** graph) {
  *graph = recording;
  recording = nullptr;
  CALL(cuStreamEndCapture);
  return 0;
}

API int cuGraphInstantiateWithFlags(void** ready, void* graph, unsigned long long) {
  CALL_WITH(cuGraphInstantiateWithFlags, "%zu", static_cast<std::vector<Task>*>(graph)->size());
  *ready = new std::vector<Task>(*static_cast<std::vector<Task>*>(graph));
  return 0;
}

API int cuGraphLaunch(void* ready, void* stream) {
  CALL(cuGraphLaunch);
  for (const Task& task : *static_cast<std::vector<Task>*>(ready)) {
    if (int code = submit(stream, task)) return code;
  }
  return 0;
}

API int cuGraphDestroy(void* graph) { CALL(cuGraphDestroy); delete static_cast<std::vector<Task>*>(graph); return 0; }

API int cuGraphExecDestroy(void* ready) { CALL(cuGraphExecDestroy); delete static_cast<std::vector<Task>*>(ready); return 0; }

API int cuEventCreate(void** event, unsigned) { CALL(cuEventCreate); *event = new Event{streams[0], 0, 0, {}}; return 0; }

API int cuEventRecord(void* event, void* handle) {
  CALL(cuEventRecord);
  auto& stream = *static_cast<Stream*>(handle);
  *static_cast<Event*>(event) = {&stream, stream.queued, stream.work_ms, stream.behind};
  return 0;
}

API int cuEventSynchronize(void* event) {
  CALL(cuEventSynchronize);
  std::this_thread::sleep_for(std::chrono::milliseconds(number("FAKE_SLOW", 0)));
  return run_until(*static_cast<Event*>(event)->stream, static_cast<Event*>(event)->ticket);
}

API int cuEventElapsedTime(float* milliseconds, void* start, void* end) {
  CALL(cuEventElapsedTime);
  *milliseconds = static_cast<float>(static_cast<Event*>(end)->at_ms - static_cast<Event*>(start)->at_ms);
  return 0;
}

API int cuEventDestroy_v2(void* event) { CALL(cuEventDestroy_v2); delete static_cast<Event*>(event); return 0; }

// cuBLASLt

namespace {

struct Description {
  int transposed[2] = {0, 0};
  int epilogue = 1;
  uint64_t bias = 0;
  int bias_type = -1;
};

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t stride;

  size_t size() const { return type == 14 ? 2 : 4; }
  size_t bytes() const { return ((columns - 1) * static_cast<size_t>(stride) + rows) * size(); }
};

float load(int type, uint64_t address, size_t index) {
  if (type == 0) return reinterpret_cast<float*>(address)[index];
  const uint32_t bits = static_cast<uint32_t>(reinterpret_cast<uint16_t*>(address)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void store(int type, uint64_t address, size_t index, float value) {
  if (type == 0) {
    reinterpret_cast<float*>(address)[index] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits += 0x7fff + (bits >> 16 & 1);
  reinterpret_cast<uint16_t*>(address)[index] = static_cast<uint16_t>(bits >> 16);
}

int copy(void* to, size_t wanted, const void* from, size_t size) {
  if (size != wanted) return 7;
  std::memcpy(to, from, size);
  return 0;
}

}  // namespace

API size_t cublasLtGetVersion() { return number("FAKE_LIBRARY", 130100); }

API int cublasLtCreate(void** library) { CALL(cublasLtCreate); *library = new int(0); return 0; }

API int cublasLtMatmulDescCreate(void** made, int compute, int scale) {
  CALL_WITH(cublasLtMatmulDescCreate, "%d %d", compute, scale);
  *made = new Description;
  return 0;
}

API int cublasLtMatmulDescSetAttribute(void* description, int which, const void* value, size_t size) {
  auto* d = static_cast<Description*>(description);
  switch (which) {
    case 3: case 4: return copy(&d->transposed[which - 3], 4, value, size);
    case 7: return copy(&d->epilogue, 4, value, size);
    case 8: return copy(&d->bias, 8, value, size);
    case 26: return copy(&d->bias_type, 4, value, size);
  }
  return 7;
}

API int cublasLtMatmulDescDestroy(void* made) { delete static_cast<Description*>(made); return 0; }

API int cublasLtMatrixLayoutCreate(void** made, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  if (rows == 0 || columns == 0 || stride < static_cast<int64_t>(rows)) return 7;
  *made = new Layout{type, rows, columns, stride};
  return 0;
}

API int cublasLtMatrixLayoutDestroy(void* made) { delete static_cast<Layout*>(made); return 0; }

API int cublasLtMatmulPreferenceCreate(void** made) { CALL(cublasLtMatmulPreferenceCreate); *made = new int(0); return 0; }

API int cublasLtMatmulPreferenceSetAttribute(void*, int which, const void*, size_t size) {
  return size == (which == 1 ? 8u : 4u) ? 0 : 7;
}

API int cublasLtMatmulPreferenceDestroy(void* made) {
  CALL(cublasLtMatmulPreferenceDestroy);
  delete static_cast<int*>(made);
  return 0;
}

struct Proposal {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

// Algorithms and what a product by them takes, in the order of the proposals.
std::vector<std::pair<uint64_t, double>> algorithms() {
  const char* text = std::getenv("FAKE_ALGORITHMS");
  std::vector<std::pair<uint64_t, double>> all;
  for (const char* at = text ? text : "77:1"; *at;) {
    char* rest = nullptr;
    const uint64_t number = std::strtoull(at, &rest, 10);
    all.emplace_back(number, std::strtod(rest + 1, &rest));
    at = *rest ? rest + 1 : rest;
  }
  return all;
}

double milliseconds_of(uint64_t algorithm) {
  for (const auto& [number, ms] : algorithms()) {
    if (number == algorithm) return ms;
  }
  return -1;
}

API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int most, Proposal* proposals, int* count) {
  CALL_WITH(cublasLtMatmulAlgoGetHeuristic, "%d", most);
  *count = 0;
  for (const auto& [algorithm, ms] : algorithms()) {
    if (*count == most) break;
    proposals[*count] = {};
    proposals[(*count)++].algorithm[0] = algorithm;
  }
  return 0;
}

API int cublasLtMatmulAlgoCheck(void*, void*, void*, void*, void*, void*, const uint64_t* algorithm, Proposal* result) {
  CALL_WITH(cublasLtMatmulAlgoCheck, "%zu", size_t(*algorithm));
  *result = {};
  result->algorithm[0] = *algorithm;
  return milliseconds_of(*algorithm) < 0 ? 15 : 0;
}

API int cublasLtMatmul(void*, void* description, const float* alpha, uint64_t a, void* la, uint64_t b, void* lb,
                       const float* beta, uint64_t c, void* lc, uint64_t d, void* ld, const uint64_t* algorithm,
                       uint64_t workspace, size_t workspace_bytes, void* stream) {
  const Description what = *static_cast<Description*>(description);
  const Layout A = *static_cast<Layout*>(la), B = *static_cast<Layout*>(lb), D = *static_cast<Layout*>(ld);
  const uint64_t inner = what.transposed[0] ? A.rows : A.columns;
  const std::string by = *algorithm == 77 ? "" : " by " + std::to_string(*algorithm);
  CALL_WITH(cublasLtMatmul, "%zu x %zu x %zu%s", size_t(D.rows), size_t(D.columns), size_t(inner), by.c_str());
  const double ms = milliseconds_of(*algorithm);
  if (*algorithm == number("FAKE_BROKEN", 0)) return 15;
  const bool has_bias = what.epilogue == 4;
  const bool fits = (what.transposed[0] ? A.columns : A.rows) == D.rows && (what.transposed[1] ? B.rows : B.columns) == D.columns &&
                    (what.transposed[1] ? B.columns : B.rows) == inner;
  if (!fits || ms < 0 || c != d || lc != ld || A.type != B.type || (has_bias && what.bias_type != D.type)) return 7;
  if (!inside(a, A.bytes()) || !inside(b, B.bytes()) || !inside(d, D.bytes()) || !inside(workspace, workspace_bytes) ||
      (has_bias && !inside(what.bias, D.rows * D.size()))) {
    return 13;
  }
  const float factor = *alpha, keep = *beta;
  const auto multiply = [=] {
    for (uint64_t j = 0; j < D.columns; ++j) {
      for (uint64_t i = 0; i < D.rows; ++i) {
        double sum = 0;
        for (uint64_t l = 0; l < inner; ++l) {
          const float x = load(A.type, a, what.transposed[0] ? l + i * A.stride : i + l * A.stride);
          const float y = load(B.type, b, what.transposed[1] ? j + l * B.stride : l + j * B.stride);
          sum += double(x) * y;
        }
        const uint64_t at = i + j * D.stride;
        float value = factor * static_cast<float>(sum);
        if (keep != 0) value += keep * load(D.type, d, at);
        if (has_bias) value += load(D.type, what.bias, i);
        store(D.type, d, at, value);
      }
    }
    return 0;
  };
  return submit(stream, {multiply, {{a, a + A.bytes()}, {b, b + B.bytes()}, {d, d + D.bytes()}}}, ms);
}
