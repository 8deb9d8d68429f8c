// Causal attention inside each example, with grouped heads.      Judge: train::cpu's attention
//   qkv     (n, (n_q + 2 * n_kv) * d_head)        a token's queries, keys, values, head after head; dqkv likewise
//   starts  (n_examples + 1)                      where each example begins, and where the last one ends: at n
//   out     (n, n_q * d_head)                     sums of values; dout likewise
//   lse     (n, n_q)                              f32: the logarithm of each softmax's denominator
//   delta   (n, n_q)                              f32: sum(dout * out) over a head
//   cache   (n_examples, capacity, 2 * n_kv * d_head)  keys and values of earlier tokens
//   past    (n_examples)                          rows of the cache that are filled
// Query head h reads key head h / (n_q / n_kv). All sums in f32. Any d_head up to 256; this is the plain form, which judges that of
// attention_mma.cu and does what that one does not take. Whatever `starts` and `past` hold, nothing outside is touched.
//
// A warp has one token and one head. It takes 32 keys at once: first a lane has a key, and its whole product, then a lane has
// dimensions, 32 apart, and adds up over the keys. The softmax is that of Milakov and Gimelshein, arXiv 1805.02867.
#include "rows.cuh"
#include "spans.cuh"

#define MOST_DIMS 8 // of a head, in a lane
#define MOST_HEAD 256

// The sum of a[i] * b[i].
template <class T> __device__ __forceinline__ float product_with(const float* a, const typename T::Bits* b, u32 n) {
    float sum = 0.0f;
    for (u32 i = 0; i < n; i++) sum = fmaf(a[i], T::widen(b[i]), sum);
    return sum;
}

// to[lane + 32 * i] += share of each lane's row * row[lane + 32 * i], the rows in order.
template <class T>
__device__ __forceinline__ void add_rows(float (&to)[MOST_DIMS], float share, const typename T::Bits* rows, u32 stride, u32 n_rows,
                                         u32 d_head) {
    u32 lane = threadIdx.x % 32;
    for (u32 j = 0; j < n_rows; j++, rows += stride) {
        float of_row = __shfl_sync(ALL_LANES, share, j);
#pragma unroll
        for (u32 i = 0; i < MOST_DIMS; i++) {
            u32 at = lane + 32 * i;
            if (at < d_head) to[i] = fmaf(of_row, T::widen(rows[at]), to[i]);
        }
    }
}

template <class T>
__device__ __forceinline__ void write_dims(typename T::Bits* to, const float (&from)[MOST_DIMS], float scale, u32 d_head) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 i = 0; i < MOST_DIMS; i++) {
        u32 at = lane + 32 * i;
        if (at < d_head) to[at] = T::round(from[i] * scale);
    }
}

// A row in f32, for all lanes of the warp.
template <class T> __device__ __forceinline__ void stage(float* to, const typename T::Bits* from, u32 d_head) {
    for (u32 i = threadIdx.x % 32; i < d_head; i += 32) to[i] = T::widen(from[i]);
    __syncwarp();
}

// Launch of all kernels with a warp for a token: 256 threads, a block for each 8 tokens (x) and each head (y); shared memory: 8 rows
// of d_head floats, or 16 for keys.
__device__ __forceinline__ u32 own_token() { return blockIdx.x * 8 + threadIdx.x / 32; }

template <class T>
__device__ __forceinline__ void attention(const typename T::Bits* qkv, const u32* starts, u32 n_examples, u32 n, u32 n_q, u32 n_kv,
                                          u32 d_head, float scale, const u32* past, const typename T::Bits* cache, u32 capacity,
                                          typename T::Bits* out, float* lse) {
    SHARED_BYTES(shared);
    float* q = (float*)shared + threadIdx.x / 32 * d_head;
    u32 lane = threadIdx.x % 32, token = own_token(), head = blockIdx.y, kv_head = head / (n_q / n_kv);
    Span span = span_of(starts, n_examples, n, token);
    if (token < span.start || token >= span.end) return;
    u32 width = (n_q + 2 * n_kv) * d_head, d_kv = n_kv * d_head;
    KeyRows<T> keys = key_rows<T>(qkv, span, width, d_kv, past, cache, capacity);
    u32 n_keys = keys.before + token - span.start + 1;
    if (past && n_keys > capacity) return;
    const typename T::Bits* k = keys.k + kv_head * d_head;
    stage<T>(q, qkv + (u64)token * width + head * d_head, d_head);
    float sums[MOST_DIMS] = {}, largest = -INFINITE, sum = 0.0f;
    for (u32 from = 0; from < n_keys; from += 32) {
        u32 n_here = n_keys - from < 32 ? n_keys - from : 32;
        float score = -INFINITE;
        if (lane < n_here) score = product_with<T>(q, k + (u64)(from + lane) * keys.stride, d_head) * scale;
        float most = fmaxf(warp_max(score), largest);
        float share = lane < n_here ? expf(score - most) : 0.0f, before = expf(largest - most);
        largest = most;
        sum = fmaf(sum, before, share);
#pragma unroll
        for (u32 i = 0; i < MOST_DIMS; i++) sums[i] *= before;
        add_rows<T>(sums, share, k + d_kv + (u64)from * keys.stride, keys.stride, n_here, d_head);
    }
    sum = warp_sum(sum);
    write_dims<T>(out + ((u64)token * n_q + head) * d_head, sums, 1.0f / sum, d_head);
    if (lse && lane == 0) lse[(u64)token * n_q + head] = largest + logf(sum);
}

// cache[i, past[i] + t] = [k | v] of token t of example i. Launch: 256 threads, any number of blocks.
template <class T>
__device__ __forceinline__ void attention_append(const typename T::Bits* qkv, const u32* starts, u32 n_examples, u32 n, u32 d_q,
                                                 u32 d_kv, const u32* past, typename T::Bits* cache, u32 capacity) {
    u64 all = (u64)n * 2 * d_kv;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += (u64)gridDim.x * blockDim.x) {
        u32 token = (u32)(i / (2 * d_kv)), at = (u32)(i % (2 * d_kv));
        Span span = span_of(starts, n_examples, n, token);
        if (token < span.start || token >= span.end) continue;
        u64 row = (u64)past[span.example] + (token - span.start);
        if (row >= capacity) continue;
        cache[((u64)span.example * capacity + row) * 2 * d_kv + at] = qkv[(u64)token * (d_q + 2 * d_kv) + d_q + at];
    }
}

template <class T>
__device__ __forceinline__ void attention_delta(const typename T::Bits* dout, const typename T::Bits* out, u32 n, u32 n_q, u32 d_head,
                                                float* delta) {
    u32 lane = threadIdx.x % 32, token = own_token();
    if (token >= n) return;
    u64 at = (u64)token * n_q + blockIdx.y;
    float sum = 0.0f;
    for (u32 i = lane; i < d_head; i += 32) sum = fmaf(T::widen(dout[at * d_head + i]), T::widen(out[at * d_head + i]), sum);
    sum = warp_sum(sum);
    if (lane == 0) delta[at] = sum;
}

// With P the shares: dS = P * (dO V^T - delta), dQ = dS K, dK = dS^T Q, dV = P^T dO: Dao et al., arXiv 2205.14135.
template <class T>
__device__ __forceinline__ void attention_dq(const typename T::Bits* qkv, const typename T::Bits* dout, const float* lse,
                                             const float* delta, const u32* starts, u32 n_examples, u32 n, u32 n_q, u32 n_kv,
                                             u32 d_head, float scale, typename T::Bits* dqkv) {
    SHARED_BYTES(shared);
    float* q = (float*)shared + threadIdx.x / 32 * 2 * d_head;
    float* of_out = q + d_head;
    u32 lane = threadIdx.x % 32, token = own_token(), head = blockIdx.y, kv_head = head / (n_q / n_kv);
    Span span = span_of(starts, n_examples, n, token);
    if (token < span.start || token >= span.end) return;
    u32 width = (n_q + 2 * n_kv) * d_head, d_q = n_q * d_head, d_kv = n_kv * d_head;
    const typename T::Bits* k = qkv + (u64)span.start * width + d_q + kv_head * d_head;
    u64 at = (u64)token * n_q + head;
    stage<T>(q, qkv + (u64)token * width + head * d_head, d_head);
    stage<T>(of_out, dout + at * d_head, d_head);
    float log_sum = lse[at], along = delta[at], sums[MOST_DIMS] = {};
    u32 n_keys = token - span.start + 1;
    for (u32 from = 0; from < n_keys; from += 32) {
        u32 n_here = n_keys - from < 32 ? n_keys - from : 32;
        float ds = 0.0f;
        if (lane < n_here) {
            const typename T::Bits* own = k + (u64)(from + lane) * width;
            float share = expf(product_with<T>(q, own, d_head) * scale - log_sum);
            ds = share * (product_with<T>(of_out, own + d_kv, d_head) - along);
        }
        add_rows<T>(sums, ds, k + (u64)from * width, width, n_here, d_head);
    }
    write_dims<T>(dqkv + (u64)token * width + head * d_head, sums, scale, d_head);
}

// The query heads of a key head in order, and the queries of each in order.
template <class T>
__device__ __forceinline__ void attention_dkv(const typename T::Bits* qkv, const typename T::Bits* dout, const float* lse,
                                              const float* delta, const u32* starts, u32 n_examples, u32 n, u32 n_q, u32 n_kv,
                                              u32 d_head, float scale, typename T::Bits* dqkv) {
    SHARED_BYTES(shared);
    float* k = (float*)shared + threadIdx.x / 32 * 2 * d_head;
    float* v = k + d_head;
    u32 lane = threadIdx.x % 32, token = own_token(), kv_head = blockIdx.y, group = n_q / n_kv;
    Span span = span_of(starts, n_examples, n, token);
    if (token < span.start || token >= span.end) return;
    u32 width = (n_q + 2 * n_kv) * d_head, d_q = n_q * d_head, d_kv = n_kv * d_head;
    u64 own = (u64)token * width + d_q + kv_head * d_head;
    stage<T>(k, qkv + own, d_head);
    stage<T>(v, qkv + own + d_kv, d_head);
    float dk[MOST_DIMS] = {}, dv[MOST_DIMS] = {};
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (u32 from = token; from < span.end; from += 32) {
            u32 n_here = span.end - from < 32 ? span.end - from : 32;
            const typename T::Bits* q = qkv + (u64)from * width + head * d_head;
            const typename T::Bits* of_out = dout + (u64)from * d_q + head * d_head;
            float share = 0.0f, ds = 0.0f;
            if (lane < n_here) {
                u64 at = (u64)(from + lane) * n_q + head;
                share = expf(product_with<T>(k, q + (u64)lane * width, d_head) * scale - lse[at]);
                ds = share * (product_with<T>(v, of_out + (u64)lane * d_q, d_head) - delta[at]);
            }
            add_rows<T>(dk, ds, q, width, n_here, d_head);
            add_rows<T>(dv, share, of_out, d_q, n_here, d_head);
        }
    }
    write_dims<T>(dqkv + own, dk, scale, d_head);
    write_dims<T>(dqkv + own + d_kv, dv, 1.0f, d_head);
}

#define ATTENTION(T, NAME)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) attention_##NAME(                                                    \
        const T::Bits* qkv, const u32* starts, u32 n_examples, u32 n, u32 n_q, u32 n_kv, u32 d_head, float scale,          \
        const u32* past, const T::Bits* cache, u32 capacity, T::Bits* out, float* lse) {                                   \
        attention<T>(qkv, starts, n_examples, n, n_q, n_kv, d_head, scale, past, cache, capacity, out, lse);               \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        attention_append_##NAME(const T::Bits* qkv, const u32* starts, u32 n_examples, u32 n, u32 d_q, u32 d_kv,           \
                                const u32* past, T::Bits* cache, u32 capacity) {                                           \
        attention_append<T>(qkv, starts, n_examples, n, d_q, d_kv, past, cache, capacity);                                 \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) attention_delta_##NAME(                                              \
        const T::Bits* dout, const T::Bits* out, u32 n, u32 n_q, u32 d_head, float* delta) {                               \
        attention_delta<T>(dout, out, n, n_q, d_head, delta);                                                              \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) attention_dq_##NAME(                                                 \
        const T::Bits* qkv, const T::Bits* dout, const float* lse, const float* delta, const u32* starts, u32 n_examples,  \
        u32 n, u32 n_q, u32 n_kv, u32 d_head, float scale, T::Bits* dqkv) {                                                \
        attention_dq<T>(qkv, dout, lse, delta, starts, n_examples, n, n_q, n_kv, d_head, scale, dqkv);                     \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) attention_dkv_##NAME(                                                \
        const T::Bits* qkv, const T::Bits* dout, const float* lse, const float* delta, const u32* starts, u32 n_examples,  \
        u32 n, u32 n_q, u32 n_kv, u32 d_head, float scale, T::Bits* dqkv) {                                                \
        attention_dkv<T>(qkv, dout, lse, delta, starts, n_examples, n, n_q, n_kv, d_head, scale, dqkv);                    \
    }

FOR_FLOATS(ATTENTION)
