// Keys of scores that are more than a magnitude.      Judge: backend::ScoredRows::keys
//   weights    (n_rows, d_in)      of `weight_type`
//   gradients  (n_rows, d_in)      of `gradient_type`; not read for kinds 0 and 4
//   norms      (n_matrices, d_in)  f32, not negative; read for kind 4 alone, d_out rows to a matrix
//   keys       (n_rows, d_in)      out: larger key, chosen first; ordered like the judge's, not always the same bits
//   first_nan  one number          row << 32 | column of the first weight, gradient or score that is no number
// Types: 0 bf16, 1 f16, 2 f32. Kinds: 0 |w| least first, 1 |g|, 2 |w * g|, 3 g * g, 4 |w| * norm. Products round once, in f32.
#include "common.cuh"

struct Element {
    u32 magnitude; // its bits without the sign
    u32 infinity;  // the largest of a number
    float value;
    __device__ __forceinline__ bool is_nan() const { return magnitude > infinity; }
};

template <class T> __device__ __forceinline__ Element element_as(const void* all, u64 at) {
    typename T::Bits bits = ((const typename T::Bits*)all)[at];
    Element element = {bits & T::MASK, T::INF, T::widen(bits)};
    return element;
}

__device__ __forceinline__ Element element_of(const void* all, u32 type, u64 at) {
    return type == 0 ? element_as<Bf16>(all, at) : type == 1 ? element_as<F16>(all, at) : element_as<F32>(all, at);
}

// Launch: 256 threads, one block per row.
extern "C" __global__ void __launch_bounds__(256)
    score_keys(const void* weights, u32 weight_type, const void* gradients, u32 gradient_type, const float* norms,
               u32 first_row, u32 d_out, u32 kind, u32 d_in, u32* keys, u64* first_nan) {
    u64 row = blockIdx.x;
    const float* of_matrix = norms + (first_row + row) / d_out * d_in;
    for (u32 column = threadIdx.x; column < d_in; column += blockDim.x) {
        u64 at = row * d_in + column;
        Element w = element_of(weights, weight_type, at);
        Element g = kind >= 1 && kind <= 3 ? element_of(gradients, gradient_type, at) : w;
        float score = kind == 2 ? w.value * g.value : kind == 3 ? g.value * g.value : kind == 4 ? w.value * of_matrix[column] : 0.0f;
        u32 product = __float_as_uint(score) & F32::MASK;
        if (w.is_nan() || g.is_nan() || product > F32::INF) report_nan(first_nan, row, column);
        keys[at] = kind == 0 ? w.infinity - w.magnitude : kind == 1 ? g.magnitude : product;
    }
}
