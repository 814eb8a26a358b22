// Enough of CUDA for the sources of csrc/kernels to run on the CPU.
//
// Blocks run one after the other; the threads of a block are coroutines that
// give way at barriers only, in rising order in even blocks and in falling order
// in odd ones, so that results which depend on the order show. Included before
// each source, by src/ffi/cuda/emulation.rs.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <math.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __constant__ static

namespace emulation {

struct Index {
  unsigned x, y;
};

enum class State { Ready, AtWarp, AtBlock, Done };

constexpr size_t STACK = 64 << 10;

// Begun by its context, and gone on with by its jump: contexts ask the operating system at each change.
struct Thread {
  ucontext_t context;
  jmp_buf jump;
  std::unique_ptr<char[]> stack;
  bool begun;
  State state;
};

inline Index grid, block_index, block_size;
inline std::vector<Thread> threads;
inline jmp_buf scheduler;
inline unsigned current;
// What the lanes of each warp show each other.
inline std::vector<uint64_t> shown;
// What the lanes of each warp give to a product of matrices.
struct Fragments {
  uint32_t a[4], b[2];
};
inline std::vector<Fragments> fragments;
inline void (*body)(const void*);
inline const void* parameters;

inline void start() {
  body(parameters);
  threads[current].state = State::Done;
  _longjmp(scheduler, 1);
}

inline void wait(State at) {
  Thread& self = threads[current];
  self.state = at;
  if (_setjmp(self.jump) == 0) _longjmp(scheduler, 1);
}

// Lets a thread go on until it waits or is done. Not inlined: a jump back into a function spoils its variables.
[[gnu::noinline]] inline void go_on(unsigned thread) {
  current = thread;
  if (_setjmp(scheduler) != 0) return;
  Thread& self = threads[current];
  if (self.begun) _longjmp(self.jump, 1);
  self.begun = true;
  setcontext(&self.context);
}

// Lets the threads from `first` on go if none of them is still under way.
inline bool release(unsigned first, unsigned count, State at) {
  bool any = false;
  for (unsigned i = first; i < first + count; i++) {
    if (threads[i].state == State::Done) continue;
    if (threads[i].state != at) return false;
    any = true;
  }
  if (!any) return false;
  for (unsigned i = first; i < first + count; i++) {
    if (threads[i].state == at) threads[i].state = State::Ready;
  }
  return true;
}

inline void run_block() {
  unsigned count = block_size.x;
  for (auto& thread : threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    makecontext(&thread.context, start, 0);
    thread.begun = false;
    thread.state = State::Ready;
  }
  for (;;) {
    bool ran = false, done = true;
    for (unsigned n = 0; n < count; n++) {
      unsigned i = block_index.x % 2 ? count - 1 - n : n;
      if (threads[i].state == State::Ready) {
        go_on(i);
        ran = true;
      }
      done = done && threads[i].state == State::Done;
    }
    if (done) return;
    bool freed = release(0, count, State::AtBlock);
    for (unsigned warp = 0; warp < count; warp += 32) freed = release(warp, 32, State::AtWarp) || freed;
    if (!ran && !freed) {
      std::fprintf(stderr, "emulation: threads of a block wait for each other at different barriers\n");
      std::abort();
    }
  }
}

inline void run(void (*kernel)(const void*), const void* with, unsigned x, unsigned y, unsigned count) {
  grid = {x, y};
  block_size = {count, 1};
  body = kernel;
  parameters = with;
  threads = std::vector<Thread>(count);
  // Not written to: most of it is never used.
  for (auto& thread : threads) thread.stack.reset(new char[STACK]);
  shown.assign(count, 0);
  fragments.assign(count, {});
  for (block_index.y = 0; block_index.y < y; block_index.y++) {
    for (block_index.x = 0; block_index.x < x; block_index.x++) run_block();
  }
}

// The value that another lane of the warp shows.
template <typename T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&shown[current], &value, sizeof(T));
  wait(State::AtWarp);
  T other;
  std::memcpy(&other, &shown[current / 32 * 32 + from % 32], sizeof(T));
  wait(State::AtWarp);
  return other;
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return current; }
  } x;
};

}  // namespace emulation

inline emulation::ThreadIndex threadIdx;
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid

#define KERNEL(name, Parameters, threads)                                                       \
  static_assert(sizeof(Parameters) % 8 == 0 && sizeof(Parameters) <= 512, "see Launch::words"); \
  static void name##_body(const Parameters& p);                                                 \
  static void name##_start(const void* p) { name##_body(*static_cast<const Parameters*>(p)); }  \
  extern "C" void name(const void* p, unsigned x, unsigned y, unsigned count) {                 \
    if (count != threads) std::abort();                                                         \
    emulation::run(name##_start, p, x, y, count);                                               \
  }                                                                                             \
  static void name##_body(const Parameters& p)

inline void __syncthreads() { emulation::wait(emulation::State::AtBlock); }
inline void __syncwarp() { emulation::wait(emulation::State::AtWarp); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, emulation::current % 32 ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  unsigned lane = emulation::current % 32;
  return emulation::exchange(value, lane + delta < 32 ? lane + delta : lane);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange(value, lane);
}

inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }

// mma.sync.m16n8k16, as the PTX manual lays its fragments out: in groups of four
// lanes, a[r][k] and b[k][n] in words of two neighbouring k.
template <typename Widen>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Widen widen) {
  using namespace emulation;
  unsigned lane = current % 32, warp = current - lane;
  fragments[current] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  wait(State::AtWarp);
  for (unsigned i = 0; i < 4; i++) {
    unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; k++) {
      uint32_t of_a = fragments[warp + row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
      uint32_t of_b = fragments[warp + column * 4 + k % 8 / 2].b[k / 8];
      d[i] += widen((uint16_t)(of_a >> 16 * (k % 2))) * widen((uint16_t)(of_b >> 16 * (k % 2)));
    }
  }
  wait(State::AtWarp);
}
