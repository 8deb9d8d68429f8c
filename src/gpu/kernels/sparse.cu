// What the trainer does to the chosen entries of a matrix (d_out, d_in).      Judge: train::CpuDevice
//   offsets  (d_out + 1)  the entries of row i are offsets[i]..offsets[i + 1]
//   columns  (nnz)        ascending within a row
// All blocks have 256 threads; an entry whose column is beyond d_in is left alone.
#include "rows.cuh"

// --- the gradient: a dot product over the tokens for each entry, of two columns that lie in rows
//   dy       (n, d_out)
//   x        (n, d_in)
//   partial  (n_slices, nnz)  f32: the sum over `slice` tokens
//
// A block has ENTRIES entries and one slice of tokens. It lays a few tokens of x side by side in shared memory, so that all that an
// entry needs of them is one load; rows of x are read whole, and dy along its rows. Columns are staged a window at a time, whatever
// d_in is.
#define ENTRIES_PER_THREAD 8
#define ENTRIES (256 * ENTRIES_PER_THREAD)
#define WINDOW 2048

// Where a column's tokens lie in the window: moved within a group of columns, so that neither filling nor reading collides.
template <u32 TOKENS> __device__ __forceinline__ u32 slot_of(u32 column) { return column ^ (column / TOKENS % TOKENS); }

// Launch: a block for each 2,048 entries (x) and each slice of tokens (y); shared memory: 16 * 2,048 bytes. `stride` is the distance
// between entries of a thread: 256 where rows have few entries, so that neighbouring threads read neighbouring dy; 1 where they
// have many, so that a thread's entries share them.
template <class T>
__device__ __forceinline__ void gather_dot(const typename T::Bits* dy, const typename T::Bits* x, const u32* offsets,
                                           const u32* columns, float* partial, u32 n, u32 d_out, u32 d_in, u32 nnz, u32 slice,
                                           u32 stride) {
    const u32 TOKENS = Width<T>::OF;
    typedef Raw<T, TOKENS> Slot;
    SHARED_BYTES(shared);
    Slot* slots = (Slot*)shared;
    u32 first = blockIdx.x * ENTRIES + (stride == 1 ? threadIdx.x * ENTRIES_PER_THREAD : threadIdx.x);
    u32 column[ENTRIES_PER_THREAD], row[ENTRIES_PER_THREAD];
    float sum[ENTRIES_PER_THREAD];
#pragma unroll
    for (u32 j = 0; j < ENTRIES_PER_THREAD; j++) {
        u32 entry = first + j * stride;
        sum[j] = 0.0f;
        row[j] = 0;
        column[j] = entry < nnz ? columns[entry] : 0xffffffff;
        if (entry >= nnz) continue;
        // The last row that begins at or before the entry, and is not empty.
        u32 low = 0, high = d_out;
        while (high - low > 1) {
            u32 middle = (low + high) / 2;
            if (offsets[middle] <= entry) low = middle;
            else high = middle;
        }
        row[j] = low;
    }
    u32 last = slice < n - blockIdx.y * slice ? (blockIdx.y + 1) * slice : n;
    bool is_aligned = d_in % TOKENS == 0;
    for (u32 token = blockIdx.y * slice; token < last; token += TOKENS) {
        for (u32 window = 0; window < d_in; window += WINDOW) {
            // A thread turns round a square of TOKENS columns and as many tokens.
            for (u32 c = threadIdx.x * TOKENS; c < WINDOW; c += 256 * TOKENS) {
                Slot rows[TOKENS];
#pragma unroll
                for (u32 t = 0; t < TOKENS; t++) {
                    const typename T::Bits* at = x + (u64)(token + t) * d_in + window + c;
                    bool is_there = token + t < last && window + c < d_in;
                    if (is_there && is_aligned) {
                        rows[t] = *(const Slot*)at;
                        continue;
                    }
#pragma unroll
                    for (u32 j = 0; j < TOKENS; j++) rows[t].of[j] = is_there && window + c + j < d_in ? at[j] : 0;
                }
#pragma unroll
                for (u32 j = 0; j < TOKENS; j++) {
                    Slot turned;
#pragma unroll
                    for (u32 t = 0; t < TOKENS; t++) turned.of[t] = rows[t].of[j];
                    slots[slot_of<TOKENS>(c + j)] = turned;
                }
            }
            __syncthreads();
            u32 of_row = 0xffffffff;
            float of_dy[TOKENS];
#pragma unroll
            for (u32 j = 0; j < ENTRIES_PER_THREAD; j++) {
                u32 c = column[j] - window;
                if (c >= WINDOW || column[j] >= d_in) continue;
                if (row[j] != of_row) {
                    of_row = row[j];
#pragma unroll
                    for (u32 t = 0; t < TOKENS; t++)
                        of_dy[t] = token + t < last ? T::widen(dy[(u64)(token + t) * d_out + of_row]) : 0.0f;
                }
                Slot slot = slots[slot_of<TOKENS>(c)];
#pragma unroll
                for (u32 t = 0; t < TOKENS; t++) sum[j] = fmaf(of_dy[t], T::widen(slot.of[t]), sum[j]);
            }
            __syncthreads();
        }
    }
#pragma unroll
    for (u32 j = 0; j < ENTRIES_PER_THREAD; j++) {
        u32 entry = first + j * stride;
        if (entry < nnz) partial[(u64)blockIdx.y * nnz + entry] = sum[j];
    }
}

// grad += the sums of all slices, in their order.
extern "C" __global__ void __launch_bounds__(256) add_slices(const float* partial, float* grad, u32 n_slices, u32 nnz) {
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < nnz; i += (u64)gridDim.x * 256) {
        float sum = 0.0f;
        for (u32 slice = 0; slice < n_slices; slice++) sum += partial[slice * (u64)nnz + i];
        grad[i] += sum;
    }
}

// grad += dense[row - first_row, column] for the entries of rows first_row..first_row + n_rows: many entries in a row are cheaper as
// a whole product, of which they are taken.
//   dense  (n_rows, d_in)  f32
// Launch: a block for each row.
extern "C" __global__ void __launch_bounds__(256)
    take_entries(const float* dense, const u32* offsets, const u32* columns, float* grad, u32 first_row, u32 d_in, u32 nnz) {
    u32 row = first_row + blockIdx.x;
    for (u32 entry = offsets[row] + threadIdx.x; entry < offsets[row + 1] && entry < nnz; entry += 256)
        if (columns[entry] < d_in) grad[entry] += dense[(u64)blockIdx.x * d_in + columns[entry]];
}

// --- the weights: weight = round(original + theta), the sum in f32; an original that is a NaN keeps its bits
//   weights    (d_out, d_in)  in place
//   originals  (nnz)
//   theta      (nnz)          f32
// Launch: any number of blocks.
template <class T>
__device__ __forceinline__ void patch_entries(typename T::Bits* weights, const u32* offsets, const u32* columns,
                                              const typename T::Bits* originals, const float* theta, u32 d_out, u32 d_in,
                                              u32 nnz) {
    for (u64 row = (u64)blockIdx.x * 256 + threadIdx.x; row < d_out; row += (u64)gridDim.x * 256) {
        for (u32 entry = offsets[row]; entry < offsets[row + 1] && entry < nnz; entry++) {
            if (columns[entry] >= d_in) continue;
            typename T::Bits original = originals[entry];
            weights[row * d_in + columns[entry]] = is_nan<T>(original) ? original : T::round(T::widen(original) + theta[entry]);
        }
    }
}

// The same of a bias, which is kept in f32: rounded to the type that it is stored in, and widened.
//   bias       (d_out)        f32, in place; rows have one entry or none
template <class T>
__device__ __forceinline__ void patch_bias(float* bias, const u32* offsets, const typename T::Bits* originals,
                                           const float* theta, u32 d_out, u32 nnz) {
    for (u64 row = (u64)blockIdx.x * 256 + threadIdx.x; row < d_out; row += (u64)gridDim.x * 256) {
        for (u32 entry = offsets[row]; entry < offsets[row + 1] && entry < nnz; entry++) {
            float original = T::widen(originals[entry]);
            bool is_nan = original != original;
            bias[row] = is_nan ? original : T::widen(T::round(original + theta[entry]));
        }
    }
}

#define SPARSE(T, NAME)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        gather_dot_##NAME(const T::Bits* dy, const T::Bits* x, const u32* offsets, const u32* columns, float* partial,     \
                          u32 n, u32 d_out, u32 d_in, u32 nnz, u32 slice, u32 stride) {                                    \
        gather_dot<T>(dy, x, offsets, columns, partial, n, d_out, d_in, nnz, slice, stride);                               \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        patch_entries_##NAME(T::Bits* weights, const u32* offsets, const u32* columns, const T::Bits* originals,           \
                             const float* theta, u32 d_out, u32 d_in, u32 nnz) {                                           \
        patch_entries<T>(weights, offsets, columns, originals, theta, d_out, d_in, nnz);                                   \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        patch_bias_##NAME(float* bias, const u32* offsets, const T::Bits* originals, const float* theta, u32 d_out,        \
                          u32 nnz) {                                                                                       \
        patch_bias<T>(bias, offsets, originals, theta, d_out, nnz);                                                        \
    }
FOR_FLOATS(SPARSE)

// --- the optimizer: AdamW in PyTorch's order of operations, every step rounded: the bits are those of train::cpu
//   theta, grad, mean, variance  (n)
// Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101
extern "C" __global__ void __launch_bounds__(256)
    adamw(float* theta, const float* grad, float* mean, float* variance, u32 n, float grad_scale, float rest_1, float beta_2,
          float rest_2, float keep, float step_size, float root, float eps) {
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < n; i += (u64)gridDim.x * 256) {
        float g = grad[i] * grad_scale;
        float m = mean[i] + (g - mean[i]) * rest_1;
        float v = variance[i] * beta_2 + rest_2 * g * g;
        mean[i] = m;
        variance[i] = v;
        theta[i] = theta[i] * keep - step_size * (m / (sqrtf(v) / root + eps));
    }
}

// sums[at + block] = the sum of the squares of every block's own values, in f64
// Launch: any number of blocks; shared memory: 8 doubles.
extern "C" __global__ void __launch_bounds__(256) sum_of_squares(const float* values, u32 n, double* sums, u32 at) {
    SHARED_BYTES(room);
    double sum = 0.0;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < n; i += (u64)gridDim.x * 256) sum += (double)values[i] * values[i];
    sum = block_sum(sum, (double*)room);
    if (threadIdx.x == 0) sums[at + blockIdx.x] = sum;
}
