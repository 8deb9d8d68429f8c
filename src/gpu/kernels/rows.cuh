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

// The sum over the 256 threads of a block, the same for all of them; `room` holds 8 numbers. Always in the same order.
template <class F> __device__ __forceinline__ F block_sum(F x, F* room) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    x = room[threadIdx.x % 8];
#pragma unroll
    for (u32 distance = 4; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    __syncthreads(); // the room can be used again
    return x;
}

// The same for the largest.
__device__ __forceinline__ float block_max(float x, float* room) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    x = room[threadIdx.x % 8];
#pragma unroll
    for (u32 distance = 4; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    __syncthreads();
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// The three types of a kernel that is declared with KERNEL(T, name).
#define FOR_FLOATS(KERNEL) KERNEL(Bf16, bf16) KERNEL(F16, f16) KERNEL(F32, f32)
