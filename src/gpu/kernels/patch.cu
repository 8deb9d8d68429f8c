// Sparse deltas on weights that lie on the device.      Judge: backend::merged_values
//   weights    (d_out, d_in)  in place
//   columns    (d_out, k)     unique within a row, so no two threads meet
//   values     (d_out, k)     f32
//   originals  (d_out, k)     what the weights were, or null where they still are
//   positions  (n)            row * d_in + column, unique
//   starts     (n + 1)        the terms of position i are terms[starts[i]..starts[i + 1]], in the order they are added
//   terms      (nnz)          f32: delta * scale, rounded
// value = round(original + delta * scale + ...): products and sums round to f32, the result once; an original that is a NaN keeps
// its bits.
#include "common.cuh"

template <class T>
__device__ __forceinline__ void patch_rows(typename T::Bits* weights, const u32* columns, const float* values, float scale,
                                           const typename T::Bits* originals, u32 d_in, u32 k, u64 n) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        u64 at = i / k * d_in + columns[i];
        typename T::Bits original = originals ? originals[i] : weights[at];
        weights[at] = is_nan<T>(original) ? original : T::round(__fadd_rn(T::widen(original), __fmul_rn(values[i], scale)));
    }
}

template <class T>
__device__ __forceinline__ void patch_terms(typename T::Bits* weights, const u64* positions, const u32* starts,
                                            const float* terms, u64 n) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        typename T::Bits original = weights[positions[i]];
        if (starts[i] == starts[i + 1] || is_nan<T>(original)) continue;
        float sum = T::widen(original);
        for (u32 term = starts[i]; term < starts[i + 1]; term++) sum = __fadd_rn(sum, terms[term]);
        weights[positions[i]] = T::round(sum);
    }
}

// What the weights at `columns` are, and, with `restore`, what they become again: the way back from a patch.
template <class Bits>
__device__ __forceinline__ void originals_of(Bits* weights, const u32* columns, Bits* originals, u32 restore, u32 d_in, u32 k,
                                             u64 n) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        u64 at = i / k * d_in + columns[i];
        if (restore) weights[at] = originals[i];
        else originals[i] = weights[at];
    }
}

// Launch: 256 threads, any number of blocks.
#define PATCH(T, NAME)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) patch_rows_##NAME(                                                   \
        T::Bits* weights, const u32* columns, const float* values, float scale, const T::Bits* originals, u32 d_in, u32 k, \
        u64 n) {                                                                                                           \
        patch_rows<T>(weights, columns, values, scale, originals, d_in, k, n);                                             \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        patch_terms_##NAME(T::Bits* weights, const u64* positions, const u32* starts, const float* terms, u64 n) {         \
        patch_terms<T>(weights, positions, starts, terms, n);                                                              \
    }

PATCH(Bf16, bf16)
PATCH(F16, f16)
PATCH(F32, f32)

extern "C" __global__ void __launch_bounds__(256)
    originals_u16(u16* weights, const u32* columns, u16* originals, u32 restore, u32 d_in, u32 k, u64 n) {
    originals_of<u16>(weights, columns, originals, restore, d_in, k, n);
}
extern "C" __global__ void __launch_bounds__(256)
    originals_u32(u32* weights, const u32* columns, u32* originals, u32 restore, u32 d_in, u32 k, u64 n) {
    originals_of<u32>(weights, columns, originals, restore, d_in, k, n);
}
