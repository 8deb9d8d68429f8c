// Logits to losses, gradients and choices.      Judge: train::CpuDevice
//   logits  (n, n_vocab)  f32; a block of 256 threads for each row; shared memory: 8 floats, or 8 u64
#include "rows.cuh"

// losses[row] = log(sum(exp(logits))) - logits[label], and the gradient of grad_scale * loss by the logits:
//   labels    (n)            a label beyond the vocabulary gives a NaN
//   losses    (n)
//   d_logits  (n, n_vocab)   T; none where it is null
template <class T, u32 V>
__device__ __forceinline__ void cross_entropy(const float* logits, u32 label, float* loss, float grad_scale,
                                              typename T::Bits* d_logits, u32 n_vocab, float* room) {
    // The largest so far, and the sum of exp(logit - largest), of this thread's share.
    float largest = -INFINITE, sum = 0.0f;
    for (u32 i = threadIdx.x * V; i < n_vocab; i += 256 * V) {
        Run<F32, V> run = load<F32, V>((const u32*)logits + i);
        float most = largest;
#pragma unroll
        for (u32 j = 0; j < V; j++) most = fmaxf(most, run.of[j]);
        sum *= expf(largest - most);
#pragma unroll
        for (u32 j = 0; j < V; j++) sum += expf(run.of[j] - most);
        largest = most;
    }
    float most = block_max(largest, room);
    // A thread without a share has seen minus infinity alone.
    sum = block_sum(sum * expf(largest - most), room);
    float of_label = label < n_vocab ? logits[label] : __uint_as_float(0x7fc00000);
    if (threadIdx.x == 0) *loss = most + logf(sum) - of_label;
    if (!d_logits) return;
    float share = grad_scale / sum;
    for (u32 i = threadIdx.x * V; i < n_vocab; i += 256 * V) {
        Run<F32, V> run = load<F32, V>((const u32*)logits + i);
        Run<T, V> gradient;
#pragma unroll
        for (u32 j = 0; j < V; j++) gradient.of[j] = expf(run.of[j] - most) * share - (i + j == label ? grad_scale : 0.0f);
        store<T, V>(d_logits + i, gradient);
    }
}

#define CROSS_ENTROPY(T, NAME)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        cross_entropy_##NAME(const float* logits, const u32* labels, float* losses, float grad_scale, T::Bits* d_logits,   \
                             u32 n_vocab) {                                                                                \
        SHARED_BYTES(room);                                                                                                \
        u64 at = (u64)blockIdx.x * n_vocab;                                                                                \
        T::Bits* gradient = d_logits ? d_logits + at : d_logits;                                                           \
        u32 label = labels[blockIdx.x];                                                                                    \
        float* loss = losses + blockIdx.x;                                                                                 \
        if (n_vocab % 4 == 0) cross_entropy<T, 4>(logits + at, label, loss, grad_scale, gradient, n_vocab, (float*)room);  \
        else cross_entropy<T, 1>(logits + at, label, loss, grad_scale, gradient, n_vocab, (float*)room);                   \
    }
FOR_FLOATS(CROSS_ENTROPY)

// tokens[row] = the largest logit's column, the lowest where several are; 0 where no logit is a number above minus infinity
extern "C" __global__ void __launch_bounds__(256) argmax_rows(const float* logits, u32* tokens, u32 n_vocab) {
    SHARED_BYTES(shared);
    u64* room = (u64*)shared;
    const float* row = logits + (u64)blockIdx.x * n_vocab;
    // The value, as an integer of the same order, above the column turned round: the largest key is the answer.
    u64 best = 0;
    for (u32 i = threadIdx.x; i < n_vocab; i += 256) {
        u32 bits = __float_as_uint(row[i]);
        u32 value = bits >> 31 ? ~bits : bits | 0x80000000;
        u64 key = (u64)value << 32 | (0xffffffff - i);
        if (row[i] > -INFINITE && key > best) best = key;
    }
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) {
        u64 other = __shfl_xor_sync(ALL_LANES, best, distance);
        if (other > best) best = other;
    }
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 warp = 1; warp < 8; warp++)
        if (room[warp] > best) best = room[warp];
    tokens[blockIdx.x] = best ? 0xffffffff - (u32)best : 0;
}
