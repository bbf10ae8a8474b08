// What the emulator's drivers share: buffers, the files, the schedule.
//
// Tensors lie one after the other in the files, each as an int64 count of bytes (-1 for null) and the bytes. Buffers
// are allocated to the byte, so that AddressSanitizer sees any access outside, and filled with 0xff (NaN).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/emulator/emulator.h"

// A buffer of exactly `bytes`, 16-byte aligned, or off by `misalign` bytes.
struct Buffer {
  std::unique_ptr<unsigned char, void (*)(void*)> memory{nullptr, std::free};
  unsigned char* data = nullptr;
  int64_t bytes = -1;

  void allocate(int64_t count, int64_t misalign) {
    bytes = count;
    void* pointer = nullptr;
    if (posix_memalign(&pointer, 64, count + misalign + (count + misalign == 0)) != 0) std::abort();
    memory.reset(static_cast<unsigned char*>(pointer));
    data = memory.get() + misalign;
    std::memset(pointer, 0xff, count + misalign);
  }
};

inline std::vector<Buffer> scratch_buffers;

inline void* allocate_scratch(void*, int64_t bytes) {
  scratch_buffers.emplace_back();
  scratch_buffers.back().allocate(bytes, 0);
  return scratch_buffers.back().data;
}

inline void check(bool ok, const char* what) {
  if (!ok) {
    std::fprintf(stderr, "driver: %s\n", what);
    std::exit(2);
  }
}

inline Buffer read_buffer(std::FILE* file, int64_t misalign) {
  int64_t bytes = 0;
  check(std::fread(&bytes, 8, 1, file) == 1, "truncated call");
  Buffer buffer;
  if (bytes < 0) return buffer;
  buffer.allocate(bytes, misalign);
  check(bytes == 0 || std::fread(buffer.data, bytes, 1, file) == 1, "truncated tensor");
  return buffer;
}

inline void write_buffer(std::FILE* file, const Buffer& buffer) {
  std::fwrite(&buffer.bytes, 8, 1, file);
  if (buffer.bytes > 0) std::fwrite(buffer.data, buffer.bytes, 1, file);
}

// main() of a driver: carries out every call of the file, a Call and what run reads after it.
template <typename Call>
int run_calls(int argc, char** argv, void (*run)(const Call&, std::FILE* in, std::FILE* out)) {
  check(argc == 6, "usage: driver calls results forward|reverse|random seed dropped_barrier");
  std::FILE* in = std::fopen(argv[1], "rb");
  std::FILE* out = std::fopen(argv[2], "wb");
  check(in && out, "cannot open the files");
  const std::string order = argv[3];
  emulator::schedule.order = order == "reverse"  ? emulator::Order::kReverse
                             : order == "random" ? emulator::Order::kRandom
                                                 : emulator::Order::kForward;
  emulator::schedule.seed = std::strtoull(argv[4], nullptr, 10);
  emulator::schedule.dropped_barrier = argv[5];
  Call call;
  while (std::fread(&call, sizeof(call), 1, in) == 1) run(call, in, out);
  std::fclose(out);
  std::fclose(in);
  for (const std::string& barrier : emulator::barriers()) std::printf("%s\n", barrier.c_str());
  return 0;
}
