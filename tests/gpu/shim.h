// Runs CUDA kernels on a CPU, so that they can be judged where there is no GPU: one fiber per CUDA thread, one block at a time.
//
// Fibers switch only where the kernel waits for others: at barriers and at exchanges between the lanes of a warp. The shim aborts
// with words where a barrier is reached by some threads of a block only, where lanes of a warp wait for different things, or
// where nobody can go on. Shared memory is filled with nonsense before each block. `order` turns round who runs first: a
// kernel whose result depends on that has a race. Asynchronous copies come only when their thread waits for them. What it cannot show:
// the memory model, alignment but of those copies and of matrices, real concurrency.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define SHIM_UNPOISON(at, n) ASAN_UNPOISON_MEMORY_REGION(at, n)
#else
#define SHIM_UNPOISON(at, n) (void)0
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED_BYTES(name) unsigned char* name = sim::shared

struct uint4 {
    unsigned x, y, z, w;
};
struct Dim {
    unsigned x = 1, y = 1, z = 1;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace sim {

// --- fibers: a stack each, and a switch that saves what the calling convention asks for

#if defined(__x86_64__)
extern "C" void shim_switch(void** save, void* to);
asm(R"(
.text
.hidden shim_switch
.globl shim_switch
.type shim_switch, @function
shim_switch:
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
.size shim_switch, .-shim_switch
)");
struct Place {
    void* sp = nullptr;
    void begin(char* stack, size_t n_bytes, void (*entry)()) {
        void** top = (void**)(((uintptr_t)stack + n_bytes) & ~(uintptr_t)15);
        *--top = nullptr;
        *--top = (void*)entry;
        sp = top - 6; // the registers, of no meaning yet
        memset(sp, 0, 6 * sizeof(void*));
    }
    static void go(Place& from, Place& to) { shim_switch(&from.sp, to.sp); }
};
#else
#include <ucontext.h>
struct Place {
    ucontext_t context;
    void begin(char* stack, size_t n_bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = n_bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void go(Place& from, Place& to) { swapcontext(&from.context, &to.context); }
};
#endif

enum Wait { NOTHING, BARRIER, SYNCWARP, SHUFFLE, BALLOT, MMA, LDMATRIX };
constexpr size_t STACK_BYTES = 128 << 10;

struct Copy {
    void* to;
    const void* from;
    size_t n_bytes;
    bool is_there;
};

struct Fiber {
    Place place;
    char* stack = nullptr;
    bool is_done = false;
    Wait wait = NOTHING;
    // What the lane shows to its warp; exchanges take turns with the two, so that one switch per exchange is enough.
    uint64_t shown[2] = {0, 0};
    unsigned turn = 0;
    unsigned fragments[2][6]; // of matrices, likewise
    std::vector<Copy> copies; // started, and not waited for
};

inline std::vector<Fiber> fibers;
inline Place scheduler;
inline unsigned current;
inline std::function<void()> body;
inline unsigned char* shared;
inline bool is_reversed;
inline const char* kernel_name = "?";

[[noreturn]] inline void give_up(const char* what, unsigned some, unsigned all) {
    fprintf(stderr, "shim: kernel %s, block (%u, %u): %s (%u of %u threads)\n", kernel_name, blockIdx.x, blockIdx.y, what, some, all);
    abort();
}

inline void wait_for(Wait what) {
    fibers[current].wait = what;
    Dim me = threadIdx;
    Place::go(fibers[current].place, scheduler);
    threadIdx = me;
}

inline void entry() {
    body();
    fibers[current].is_done = true;
    Place::go(fibers[current].place, scheduler);
}

// Lets a warp go on whose lanes all wait for the same exchange.
inline bool release_warp(unsigned first, unsigned n) {
    Wait what = NOTHING;
    unsigned n_waiting = 0, n_done = 0;
    for (unsigned i = first; i < first + n; i++) {
        n_done += fibers[i].is_done;
        if (fibers[i].is_done || fibers[i].wait <= BARRIER) continue;
        if (what != NOTHING && what != fibers[i].wait) give_up("lanes of a warp wait for different exchanges", n_waiting, n);
        what = fibers[i].wait;
        n_waiting++;
    }
    if (n_waiting == 0) return false;
    if (n_done > 0) give_up("an exchange of a warp, of which lanes have left", n_waiting, n);
    if (n_waiting < n) return false;
    for (unsigned i = first; i < first + n; i++) fibers[i].wait = NOTHING;
    return true;
}

inline void run_block(unsigned n) {
    if (fibers.size() < n) fibers.resize(n);
    for (unsigned i = 0; i < n; i++) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack = (char*)malloc(STACK_BYTES);
        SHIM_UNPOISON(fiber.stack, STACK_BYTES);
        fiber.is_done = false;
        fiber.wait = NOTHING;
        fiber.turn = 0;
        fiber.copies.clear();
        fiber.place.begin(fiber.stack, STACK_BYTES, entry);
    }
    for (;;) {
        bool has_run = false;
        for (unsigned j = 0; j < n; j++) {
            unsigned i = is_reversed ? n - 1 - j : j;
            if (fibers[i].is_done || fibers[i].wait != NOTHING) continue;
            current = i;
            threadIdx = Dim{i, 0, 0};
            Place::go(scheduler, fibers[i].place);
            has_run = true;
        }
        for (unsigned warp = 0; warp < n; warp += 32) has_run |= release_warp(warp, 32);
        unsigned n_left = 0, at_barrier = 0;
        for (unsigned i = 0; i < n; i++) n_left += !fibers[i].is_done, at_barrier += !fibers[i].is_done && fibers[i].wait == BARRIER;
        if (n_left == 0) return;
        if (at_barrier == n_left) {
            if (n_left != n) give_up("__syncthreads, and the others have left", at_barrier, n);
            for (unsigned i = 0; i < n; i++) fibers[i].wait = NOTHING;
            has_run = true;
        }
        if (!has_run) give_up("nobody can go on: a barrier or an exchange that not all reach", at_barrier, n);
    }
}

// Runs a kernel. Blocks are whole warps in one dimension, as all kernels of the project have them.
inline void launch(const char* name, Dim grid, unsigned block, size_t shared_bytes, std::function<void()> kernel) {
    kernel_name = name;
    gridDim = grid;
    blockDim = Dim{block, 1, 1};
    body = kernel;
    if (block % 32) give_up("blocks are whole warps", block, block);
    // Of its own size, so that a sanitizer sees what lies beyond.
    shared = (unsigned char*)aligned_alloc(16, (shared_bytes + 15) & ~(size_t)15);
    uint64_t n_blocks = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t j = 0; j < n_blocks; j++) {
        uint64_t i = is_reversed ? n_blocks - 1 - j : j;
        blockIdx = Dim{(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y)};
        memset(shared, 0xa5, shared_bytes);
        run_block(block);
    }
    free(shared);
}

// Shows a value to the warp, waits until all lanes have, and returns where theirs are.
inline unsigned show(uint64_t value, Wait what) {
    unsigned turn = fibers[current].turn++ % 2;
    fibers[current].shown[turn] = value;
    wait_for(what);
    return turn;
}

template <class T> unsigned show_bits(T value, Wait what) {
    static_assert(sizeof(T) <= 8, "lanes exchange up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return show(bits, what);
}

template <class T> T shown_by(unsigned lane, unsigned turn) {
    T value;
    memcpy(&value, &fibers[(current & ~31u) | (lane & 31)].shown[turn], sizeof(T));
    return value;
}

// --- tensor cores: fragments and matrices as the PTX manual draws them, for mma.m16n8k16 and ldmatrix.x4

// c (16 x 8) += a (16 x 16) b (16 x 8).
template <class T> void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    unsigned turn = fibers[current].turn % 2, warp = current & ~31u, lane = current % 32;
    unsigned* own = fibers[current].fragments[turn];
    for (unsigned i = 0; i < 4; i++) own[i] = a[i];
    own[4] = b0, own[5] = b1;
    show(0, MMA);
    // Two elements to a register, the first one in the low half.
    auto half = [&](unsigned of_lane, unsigned i, unsigned which) {
        return T::widen((uint16_t)(fibers[warp + of_lane].fragments[turn][i] >> 16 * which));
    };
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (unsigned k = 0; k < 16; k++) {
            float of_a = half(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2);
            sum += of_a * half(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        }
        c[i] += sum;
    }
}

inline void must(bool is_so, const char* what) {
    if (!is_so) give_up(what, current, (unsigned)fibers.size());
}

inline void ldmatrix(unsigned (&r)[4], const uint16_t* row, bool is_turned) {
    must((uintptr_t)row % 16 == 0, "a row of a matrix begins at no multiple of 16 bytes");
    unsigned turn = show((uint64_t)row, LDMATRIX), lane = current % 32;
    for (unsigned i = 0; i < 4; i++) {
        uint16_t two[2];
        for (unsigned j = 0; j < 2; j++) {
            unsigned at_row = is_turned ? lane % 4 * 2 + j : lane / 4, at_column = is_turned ? lane / 4 : lane % 4 * 2 + j;
            two[j] = shown_by<const uint16_t*>(8 * i + at_row, turn)[at_column];
        }
        r[i] = two[0] | (unsigned)two[1] << 16;
    }
}

// Copies come as late as they may: what is read before somebody waited for them is nonsense.
inline void copy_later(void* to, const void* from, size_t n_bytes, bool is_there) {
    must((uintptr_t)to % n_bytes == 0 && (uintptr_t)from % n_bytes == 0, "a copy that begins at no multiple of its size");
    memset(to, 0xa5, n_bytes);
    fibers[current].copies.push_back({to, from, n_bytes, is_there});
}
inline void copies_done() {
    for (const Copy& copy : fibers[current].copies) {
        if (copy.is_there) memcpy(copy.to, copy.from, copy.n_bytes);
        else memset(copy.to, 0, copy.n_bytes);
    }
    fibers[current].copies.clear();
}

} // namespace sim

// --- what kernels call

inline void __syncthreads() { sim::wait_for(sim::BARRIER); }
inline void __syncwarp(unsigned = ~0u) { sim::wait_for(sim::SYNCWARP); }
template <class T> T __shfl_sync(unsigned, T value, unsigned lane) {
    return sim::shown_by<T>(lane, sim::show_bits(value, sim::SHUFFLE));
}
template <class T> T __shfl_xor_sync(unsigned, T value, unsigned distance) {
    unsigned turn = sim::show_bits(value, sim::SHUFFLE);
    return sim::shown_by<T>(sim::current ^ distance, turn);
}
template <class T> T __shfl_down_sync(unsigned, T value, unsigned distance) {
    unsigned turn = sim::show_bits(value, sim::SHUFFLE), lane = sim::current % 32;
    return lane + distance < 32 ? sim::shown_by<T>(lane + distance, turn) : value;
}
template <class T> T __shfl_up_sync(unsigned, T value, unsigned distance) {
    unsigned turn = sim::show_bits(value, sim::SHUFFLE), lane = sim::current % 32;
    return lane >= distance ? sim::shown_by<T>(lane - distance, turn) : value;
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned turn = sim::show(vote, sim::BALLOT), votes = 0;
    for (unsigned lane = 0; lane < 32; lane++) votes |= sim::shown_by<unsigned>(lane, turn) << lane;
    return votes;
}
template <class T> T atomicAdd(T* at, T value) {
    T old = *at;
    *at = old + value;
    return old;
}
template <class T> T atomicMin(T* at, T value) {
    T old = *at;
    if (value < old) *at = value;
    return old;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
inline unsigned __vmaxu2(unsigned a, unsigned b) {
    unsigned low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff, high = (a >> 16) > (b >> 16) ? a >> 16 : b >> 16;
    return high << 16 | low;
}
