// The operations of the trainer's passes that treat each token by itself.      Judge: train::CpuDevice
//   Activations have the type T, gains and biases are f32, sums too; n is a number of tokens. All blocks have 256 threads.
#include "rows.cuh"

// --- norms of rows: a block for each token; shared memory: 8 floats

// y = x / rms(x) * gain
//   x, y  (n, d)
//   gain  (d)
template <class T, u32 V>
__device__ __forceinline__ void rms_norm(const typename T::Bits* x, const float* gain, typename T::Bits* y, u32 d, float eps,
                                         float* room) {
    float squares = 0.0f;
    for (u32 i = threadIdx.x * V; i < d; i += 256 * V) {
        Run<T, V> run = load<T, V>(x + i);
#pragma unroll
        for (u32 j = 0; j < V; j++) squares = fmaf(run.of[j], run.of[j], squares);
    }
    float scale = 1.0f / sqrtf(block_sum(squares, room) / (float)d + eps);
    for (u32 i = threadIdx.x * V; i < d; i += 256 * V) {
        Run<T, V> run = load<T, V>(x + i);
#pragma unroll
        for (u32 j = 0; j < V; j++) run.of[j] = run.of[j] * scale * gain[i + j];
        store<T, V>(y + i, run);
    }
}

// dx += s g - x s^3 (g . x) / d, with s = 1 / rms(x) and g = dy gain
//   dy, x, dx  (n, d)
template <class T, u32 V>
__device__ __forceinline__ void rms_norm_back(const typename T::Bits* dy, const typename T::Bits* x, const float* gain,
                                              typename T::Bits* dx, u32 d, float eps, float* room) {
    float squares = 0.0f, along = 0.0f;
    for (u32 i = threadIdx.x * V; i < d; i += 256 * V) {
        Run<T, V> of_x = load<T, V>(x + i), of_dy = load<T, V>(dy + i);
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            squares = fmaf(of_x.of[j], of_x.of[j], squares);
            along = fmaf(of_dy.of[j] * gain[i + j], of_x.of[j], along);
        }
    }
    float scale = 1.0f / sqrtf(block_sum(squares, room) / (float)d + eps);
    along = scale * scale * scale * block_sum(along, room) / (float)d;
    for (u32 i = threadIdx.x * V; i < d; i += 256 * V) {
        Run<T, V> of_x = load<T, V>(x + i), of_dy = load<T, V>(dy + i), of_dx = load<T, V>(dx + i);
#pragma unroll
        for (u32 j = 0; j < V; j++) of_dx.of[j] += scale * (of_dy.of[j] * gain[i + j]) - of_x.of[j] * along;
        store<T, V>(dx + i, of_dx);
    }
}

#define NORMS(T, NAME)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        rms_norm_##NAME(const T::Bits* x, const float* gain, T::Bits* y, u32 d, float eps) {                               \
        SHARED_BYTES(room);                                                                                                \
        u64 at = (u64)blockIdx.x * d;                                                                                      \
        if (d % Width<T>::OF == 0) rms_norm<T, Width<T>::OF>(x + at, gain, y + at, d, eps, (float*)room);                  \
        else rms_norm<T, 1>(x + at, gain, y + at, d, eps, (float*)room);                                                   \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        rms_norm_back_##NAME(const T::Bits* dy, const T::Bits* x, const float* gain, T::Bits* dx, u32 d, float eps) {      \
        SHARED_BYTES(room);                                                                                                \
        u64 at = (u64)blockIdx.x * d;                                                                                      \
        if (d % Width<T>::OF == 0)                                                                                         \
            rms_norm_back<T, Width<T>::OF>(dy + at, x + at, gain, dx + at, d, eps, (float*)room);                          \
        else rms_norm_back<T, 1>(dy + at, x + at, gain, dx + at, d, eps, (float*)room);                                    \
    }
FOR_FLOATS(NORMS)

// --- norms of heads: a warp for each query and key head of each token
//   qkv, dqkv, raw  (n, d_qkv)
//   q_gain, k_gain  (d_head)

// The head of this warp: where it begins, and its gain. None beyond the last.
struct Head {
    u64 at;
    const float* gain;
    bool is_there;
};

__device__ __forceinline__ Head head_of_warp(const float* q_gain, const float* k_gain, u32 n, u32 n_q, u32 n_kv, u32 d_head) {
    u64 warp = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    u32 n_turned = n_q + n_kv, token = (u32)(warp / n_turned), head = (u32)(warp % n_turned);
    u64 width = (u64)(n_turned + n_kv) * d_head;
    return {token * width + head * d_head, head < n_q ? q_gain : k_gain, token < n};
}

// As rms_norm, in place.
template <class T>
__device__ __forceinline__ void head_norm(typename T::Bits* qkv, const float* q_gain, const float* k_gain, u32 n, u32 n_q,
                                          u32 n_kv, u32 d_head, float eps) {
    Head head = head_of_warp(q_gain, k_gain, n, n_q, n_kv, d_head);
    if (!head.is_there) return;
    typename T::Bits* x = qkv + head.at;
    float squares = 0.0f;
    for (u32 i = threadIdx.x % 32; i < d_head; i += 32) squares = fmaf(T::widen(x[i]), T::widen(x[i]), squares);
    float scale = 1.0f / sqrtf(warp_sum(squares) / (float)d_head + eps);
    for (u32 i = threadIdx.x % 32; i < d_head; i += 32) x[i] = T::round(T::widen(x[i]) * (scale * head.gain[i]));
}

// As rms_norm_back, in place of the gradient.
template <class T>
__device__ __forceinline__ void head_norm_back(typename T::Bits* dqkv, const typename T::Bits* raw, const float* q_gain,
                                               const float* k_gain, u32 n, u32 n_q, u32 n_kv, u32 d_head, float eps) {
    Head head = head_of_warp(q_gain, k_gain, n, n_q, n_kv, d_head);
    if (!head.is_there) return;
    const typename T::Bits* x = raw + head.at;
    typename T::Bits* dy = dqkv + head.at;
    float squares = 0.0f, along = 0.0f;
    for (u32 i = threadIdx.x % 32; i < d_head; i += 32) {
        squares = fmaf(T::widen(x[i]), T::widen(x[i]), squares);
        along = fmaf(T::widen(dy[i]) * head.gain[i], T::widen(x[i]), along);
    }
    float scale = 1.0f / sqrtf(warp_sum(squares) / (float)d_head + eps);
    along = scale * scale * scale * warp_sum(along) / (float)d_head;
    for (u32 i = threadIdx.x % 32; i < d_head; i += 32)
        dy[i] = T::round(scale * (T::widen(dy[i]) * head.gain[i]) - T::widen(x[i]) * along);
}

// --- rotary positions: a thread for each token and pair, for all its query and key heads
//   qkv          (n, d_qkv)     in place: elements i and i + d_head / 2 of a head turn together
//   positions    (n)
//   frequencies  (d_head / 2)   radians per position
template <class T>
__device__ __forceinline__ void rope(typename T::Bits* qkv, const u32* positions, const float* frequencies, u32 n, u32 n_q,
                                     u32 n_kv, u32 d_head, u32 inverse) {
    u32 half = d_head / 2;
    u64 thread = (u64)blockIdx.x * 256 + threadIdx.x;
    u32 token = (u32)(thread / half), i = (u32)(thread % half);
    if (token >= n) return;
    float sine, cosine;
    sincosf((float)positions[token] * frequencies[i], &sine, &cosine);
    if (inverse) sine = -sine;
    typename T::Bits* at = qkv + (u64)token * (n_q + 2 * n_kv) * d_head + i;
    for (u32 head = 0; head < n_q + n_kv; head++, at += d_head) {
        float a = T::widen(at[0]), b = T::widen(at[half]);
        at[0] = T::round(a * cosine - b * sine);
        at[half] = T::round(b * cosine + a * sine);
    }
}

#define HEADS(T, NAME)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        head_norm_##NAME(T::Bits* qkv, const float* q_gain, const float* k_gain, u32 n, u32 n_q, u32 n_kv, u32 d_head,     \
                         float eps) {                                                                                      \
        head_norm<T>(qkv, q_gain, k_gain, n, n_q, n_kv, d_head, eps);                                                      \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        head_norm_back_##NAME(T::Bits* dqkv, const T::Bits* raw, const float* q_gain, const float* k_gain, u32 n, u32 n_q, \
                              u32 n_kv, u32 d_head, float eps) {                                                           \
        head_norm_back<T>(dqkv, raw, q_gain, k_gain, n, n_q, n_kv, d_head, eps);                                           \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        rope_##NAME(T::Bits* qkv, const u32* positions, const float* frequencies, u32 n, u32 n_q, u32 n_kv, u32 d_head,    \
                    u32 inverse) {                                                                                         \
        rope<T>(qkv, positions, frequencies, n, n_q, n_kv, d_head, inverse);                                               \
    }
FOR_FLOATS(HEADS)

// --- SwiGLU: h = silu(gate) up; a thread for V elements of h
//   gate_up, d_gate_up  (n, 2 d_ff)   [gate | up]
//   h, dh               (n, d_ff)
template <class T, u32 V>
__device__ __forceinline__ void swiglu(const typename T::Bits* gate_up, typename T::Bits* h, u32 n, u32 d_ff) {
    u32 in_row = d_ff / V;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < (u64)n * in_row; i += (u64)gridDim.x * 256) {
        u64 token = i / in_row, at = token * 2 * d_ff + i % in_row * V;
        Run<T, V> gate = load<T, V>(gate_up + at), up = load<T, V>(gate_up + at + d_ff);
#pragma unroll
        for (u32 j = 0; j < V; j++) up.of[j] *= gate.of[j] / (1.0f + expf(-gate.of[j]));
        store<T, V>(h + i * V, up);
    }
}

template <class T, u32 V>
__device__ __forceinline__ void swiglu_back(const typename T::Bits* dh, const typename T::Bits* gate_up,
                                            typename T::Bits* d_gate_up, u32 n, u32 d_ff) {
    u32 in_row = d_ff / V;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < (u64)n * in_row; i += (u64)gridDim.x * 256) {
        u64 token = i / in_row, at = token * 2 * d_ff + i % in_row * V;
        Run<T, V> gate = load<T, V>(gate_up + at), up = load<T, V>(gate_up + at + d_ff), of_h = load<T, V>(dh + i * V);
#pragma unroll
        for (u32 j = 0; j < V; j++) {
            float g = gate.of[j], s = 1.0f / (1.0f + expf(-g));
            gate.of[j] = of_h.of[j] * up.of[j] * s * (1.0f + g * (1.0f - s));
            up.of[j] = of_h.of[j] * g * s;
        }
        store<T, V>(d_gate_up + at, gate);
        store<T, V>(d_gate_up + at + d_ff, up);
    }
}

// y = bias, or y += bias
//   bias  (d)
//   y     (n, d)
template <class T>
__device__ __forceinline__ void add_bias(const float* bias, typename T::Bits* y, u32 adds, u32 n, u32 d) {
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < (u64)n * d; i += (u64)gridDim.x * 256)
        y[i] = T::round(adds ? T::widen(y[i]) + bias[i % d] : bias[i % d]);
}

#define ELEMENTS(T, NAME)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) swiglu_##NAME(const T::Bits* gate_up, T::Bits* h, u32 n, u32 d_ff) { \
        if (d_ff % Width<T>::OF == 0) swiglu<T, Width<T>::OF>(gate_up, h, n, d_ff);                                        \
        else swiglu<T, 1>(gate_up, h, n, d_ff);                                                                            \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        swiglu_back_##NAME(const T::Bits* dh, const T::Bits* gate_up, T::Bits* d_gate_up, u32 n, u32 d_ff) {               \
        if (d_ff % Width<T>::OF == 0) swiglu_back<T, Width<T>::OF>(dh, gate_up, d_gate_up, n, d_ff);                       \
        else swiglu_back<T, 1>(dh, gate_up, d_gate_up, n, d_ff);                                                           \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        add_bias_##NAME(const float* bias, T::Bits* y, u32 adds, u32 n, u32 d) {                                           \
        add_bias<T>(bias, y, adds, n, d);                                                                                  \
    }
FOR_FLOATS(ELEMENTS)

// --- rows by number: a block for each
//   table  (n_table, n_units)   units of 16 or 2 bytes
//   rows   (gridDim.x)          a row that the table does not have is all zero, or is not written

template <class Unit>
__device__ __forceinline__ void take_rows(const Unit* table, const u32* rows, Unit* y, u32 n_table, u32 n_units) {
    u32 row = rows[blockIdx.x];
    for (u32 i = threadIdx.x; i < n_units; i += 256) {
        Unit unit = {};
        if (row < n_table) unit = table[(u64)row * n_units + i];
        y[(u64)blockIdx.x * n_units + i] = unit;
    }
}

template <class Unit>
__device__ __forceinline__ void put_rows(const Unit* y, const u32* rows, Unit* x, u32 n, u32 n_units) {
    u32 row = rows[blockIdx.x];
    if (row >= n) return;
    for (u32 i = threadIdx.x; i < n_units; i += 256) x[(u64)row * n_units + i] = y[(u64)blockIdx.x * n_units + i];
}

#define ROWS(UNIT, NAME)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        take_rows_##NAME(const UNIT* table, const u32* rows, UNIT* y, u32 n_table, u32 n_units) {                          \
        take_rows<UNIT>(table, rows, y, n_table, n_units);                                                                 \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        put_rows_##NAME(const UNIT* y, const u32* rows, UNIT* x, u32 n, u32 n_units) {                                     \
        put_rows<UNIT>(y, rows, x, n, n_units);                                                                            \
    }
ROWS(uint4, wide)
ROWS(u16, narrow)
