// An NCCL without a GPU, for tests of ranks on the fake driver, whose device memory is host memory.
//
// Ranks meet in a folder, whose path is their id. Each operation of a rank is a file of its bytes; sums are taken in the order of the
// ranks. Operations are queued on their stream and done when the fake driver does its work.
//
//   FAKE_LOG    file to which every call is appended
//   FAKE_FAIL   function:code[:calls that still succeed]
//   FAKE_RANKS  where the folder is made

#include <dlfcn.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

namespace {

struct Comm {
  std::string folder;
  int rank, size, count;
};

struct Id {
  char bytes[128];
};

void log(const std::string& line) {
  const char* path = std::getenv("FAKE_LOG");
  std::FILE* file = path ? std::fopen(path, "a") : nullptr;
  if (!file) return;
  std::fprintf(file, "%s\n", line.c_str());
  std::fclose(file);
}

int fails(const std::string& function) {
  log(function);
  static std::map<std::string, uint64_t> calls;
  const char* text = std::getenv("FAKE_FAIL");
  if (!text || std::strncmp(text, (function + ":").c_str(), function.size() + 1) != 0) return 0;
  char* rest = nullptr;
  const int code = static_cast<int>(std::strtol(text + function.size() + 1, &rest, 10));
  const uint64_t succeed = *rest == ':' ? std::strtoull(rest + 1, nullptr, 10) : 0;
  return calls[function]++ < succeed ? 0 : code;
}

// Work on `bytes` bytes from `at` on, when its turn on the stream comes.
int queue(void* stream, std::function<int()> work, const void* at, size_t bytes) {
  using Submit = int (*)(void*, int (*)(void*), void*, uint64_t, size_t);
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
  auto submit = driver ? reinterpret_cast<Submit>(dlsym(driver, "fake_submit")) : nullptr;
  if (!submit) return 1;
  auto run = [](void* data) { return (*static_cast<std::function<int()>*>(data))(); };
  return submit(stream, run, new std::function<int()>(std::move(work)), reinterpret_cast<uint64_t>(at), bytes) == 0 ? 0 : 1;
}

std::string name(const Comm& comm, int operation, int rank) {
  return comm.folder + "/" + std::to_string(operation) + "." + std::to_string(rank);
}

void put(const Comm& comm, int operation, const void* from, size_t bytes) {
  const std::string path = name(comm, operation, comm.rank);
  std::FILE* file = std::fopen((path + ".part").c_str(), "w");
  std::fwrite(from, 1, bytes, file);
  std::fclose(file);
  std::rename((path + ".part").c_str(), path.c_str());
}

// The bytes of a rank; empty when it does not come.
std::vector<char> take(const Comm& comm, int operation, int rank, size_t bytes) {
  for (int i = 0; i < 2000; ++i) {
    if (std::FILE* file = std::fopen(name(comm, operation, rank).c_str(), "r")) {
      std::vector<char> all(bytes);
      const size_t got = std::fread(all.data(), 1, bytes, file);
      std::fclose(file);
      return got == bytes ? all : std::vector<char>();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return {};
}

size_t size_of(int type) { return type == 8 || type == 5 ? 8 : type == 7 || type == 3 ? 4 : 2; }

template <typename T>
void add(std::vector<char>& sum, const std::vector<char>& more) {
  for (size_t i = 0; i + sizeof(T) <= sum.size(); i += sizeof(T)) {
    T a, b;
    std::memcpy(&a, &sum[i], sizeof a);
    std::memcpy(&b, &more[i], sizeof b);
    a += b;
    std::memcpy(&sum[i], &a, sizeof a);
  }
}

// The sum over ranks of `count` elements, of which `kept` from element `first` on are written.
int reduce(const void* from, void* to, size_t count, size_t first, size_t kept, int type, const Comm& comm, int operation) {
  const size_t bytes = count * size_of(type);
  put(comm, operation, from, bytes);
  std::vector<char> sum;
  for (int rank = 0; rank < comm.size; ++rank) {
    const std::vector<char> one = take(comm, operation, rank, bytes);
    if (one.empty()) return 719;
    if (rank == 0) sum = one;
    else if (type == 7) add<float>(sum, one);
    else if (type == 8) add<double>(sum, one);
    else return 719;
  }
  std::memcpy(to, &sum[first * size_of(type)], kept * size_of(type));
  return 0;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))
#define CALL(function) \
  if (int code = fails(#function)) return code

API const char* ncclGetErrorString(int code) { return code == 6 ? "remote process exited" : "fake failure"; }

API int ncclGetUniqueId(Id* id) {
  CALL(ncclGetUniqueId);
  std::memset(id, 0, sizeof *id);
  const char* folder = std::getenv("FAKE_RANKS");
  std::snprintf(id->bytes, sizeof id->bytes, "%s/XXXXXX", folder ? folder : ".");
  return mkdtemp(id->bytes) ? 0 : 2;
}

API int ncclCommInitRank(void** comm, int size, Id id, int rank) {
  CALL(ncclCommInitRank);
  *comm = new Comm{id.bytes, rank, size, 0};
  return 0;
}

API int ncclAllReduce(const void* from, void* to, size_t n, int type, int, void* comm, void* stream) {
  CALL(ncclAllReduce);
  Comm& c = *static_cast<Comm*>(comm);
  const int operation = c.count++;
  return queue(stream, [=, &c] { return reduce(from, to, n, 0, n, type, c, operation); }, from, n * size_of(type));
}

API int ncclReduceScatter(const void* from, void* to, size_t part, int type, int, void* comm, void* stream) {
  CALL(ncclReduceScatter);
  Comm& c = *static_cast<Comm*>(comm);
  const int operation = c.count++;
  const size_t n = part * c.size;
  return queue(stream, [=, &c] { return reduce(from, to, n, part * c.rank, part, type, c, operation); }, from, n * size_of(type));
}

API int ncclAllGather(const void* from, void* to, size_t part, int type, void* comm, void* stream) {
  CALL(ncclAllGather);
  Comm& c = *static_cast<Comm*>(comm);
  const int operation = c.count++;
  const size_t bytes = part * size_of(type);
  const auto gather = [=, &c] {
    put(c, operation, from, bytes);
    for (int rank = 0; rank < c.size; ++rank) {
      const std::vector<char> one = take(c, operation, rank, bytes);
      if (one.empty()) return 719;
      std::memcpy(static_cast<char*>(to) + rank * bytes, one.data(), bytes);
    }
    return 0;
  };
  return queue(stream, gather, to, bytes * c.size);
}

API int ncclBroadcast(const void* from, void* to, size_t n, int type, int root, void* comm, void* stream) {
  CALL(ncclBroadcast);
  Comm& c = *static_cast<Comm*>(comm);
  const int operation = c.count++;
  const size_t bytes = n * size_of(type);
  const auto copy = [=, &c] {
    if (c.rank == root) put(c, operation, from, bytes);
    const std::vector<char> one = take(c, operation, root, bytes);
    if (one.empty()) return 719;
    std::memcpy(to, one.data(), one.size());
    return 0;
  };
  return queue(stream, copy, from, bytes);
}
