// What kernels share that treat matrices row by row: runs of neighbours in one load, and sums over a block.
#pragma once
#include "common.cuh"

// V neighbouring elements of type T, read and written in one piece.
template <class T, u32 V> struct Run {
    float of[V];
};

template <class T, u32 V> struct alignas(V * sizeof(typename T::Bits)) Raw {
    typename T::Bits of[V];
};

template <class T, u32 V> __device__ __forceinline__ Run<T, V> load(const typename T::Bits* at) {
    Raw<T, V> raw = *(const Raw<T, V>*)at;
    Run<T, V> run;
#pragma unroll
    for (u32 i = 0; i < V; i++) run.of[i] = T::widen(raw.of[i]);
    return run;
}

template <class T, u32 V> __device__ __forceinline__ void store(typename T::Bits* at, const Run<T, V>& run) {
    Raw<T, V> raw;
#pragma unroll
    for (u32 i = 0; i < V; i++) raw.of[i] = T::round(run.of[i]);
    *(Raw<T, V>*)at = raw;
}

// Elements in 16 bytes.
template <class T> struct Width {
    static const u32 OF = 16 / sizeof(typename T::Bits);
};

// The sum over a warp, and the largest of it, the same for all lanes. Always in the same order.
template <class F> __device__ __forceinline__ F warp_sum(F x) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// Shows what each warp has to all 256 threads of a block: every lane gets that of the warp of its number, modulo 8; `room` holds 8.
template <class F> __device__ __forceinline__ F of_warps(F x, F* room) {
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    x = room[threadIdx.x % 8];
    __syncthreads(); // the room can be used again
    return x;
}

// The same over the 256 threads of a block.
template <class F> __device__ __forceinline__ F block_sum(F x, F* room) {
    x = of_warps(warp_sum(x), room);
#pragma unroll
    for (u32 distance = 4; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}
__device__ __forceinline__ float block_max(float x, float* room) { return warp_max(of_warps(warp_max(x), room)); }

// The three types of a kernel that is declared with KERNEL(T, name).
#define FOR_FLOATS(KERNEL) KERNEL(Bf16, bf16) KERNEL(F16, f16) KERNEL(F32, f32)
