// The attention of attention.cu on tensor cores, for 16-bit types and heads of D = 64, 80, 96 or 128.      Judge: attention.cu
//
// Dao, FlashAttention-2, arXiv 2307.08691: a block has a head and a run of queries of one example, passes over the keys before them in
// tiles, and keeps a running softmax; the gradient is made again from `lse`. It is two passes here, one over runs of queries for dQ and
// one over runs of keys for dK and dV, which costs a seventh more products than sums by atomics, and gives the same bits every time.
//
// Scores and all sums are f32. Shares and dS are rounded to T before their second product: an output is off by half a distance of
// neighbours of sum(|share * v|) at most beside its own rounding, and gradients likewise. Inputs begin at multiples of 16 bytes.
//
// Rows of a tile lie D + 8 elements apart, an odd number of 16 bytes: the 8 rows of an `ldmatrix` fall on different banks.
#pragma once
#include "mma.cuh"
#include "spans.cuh"

#define LOG2_E 1.4426950408889634f
#define MMA_THREADS 128 // four warps

// A tile of ROWS rows: starts to copy those below n_there, and zeros for the others. 128 rows fit 32 bits.
template <u32 D, u32 ROWS> __device__ __forceinline__ void fetch(u16* to, const u16* from, u32 stride, u32 n_there) {
    const u32 PER_ROW = D / 8, AT_ONCE = MMA_THREADS / PER_ROW; // pieces of a row; rows that all threads reach together
    if (MMA_THREADS % PER_ROW == 0) {
        u32 row = threadIdx.x / PER_ROW, at = threadIdx.x % PER_ROW * 8;
        SharedAt own = to + row * (D + 8) + at;
        from += row * stride + at;
#pragma unroll
        for (u32 i = 0; i < ROWS; i += AT_ONCE, from += AT_ONCE * stride) copy_16(own + i * (D + 8), from, row + i < n_there);
        return;
    }
    SharedAt tile = to;
#pragma unroll
    for (u32 i = 0; i < ROWS * PER_ROW; i += MMA_THREADS) {
        u32 row = (i + threadIdx.x) / PER_ROW, at = (i + threadIdx.x) % PER_ROW * 8;
        if (ROWS * PER_ROW % MMA_THREADS && row >= ROWS) break;
        copy_16(tile + (row * (D + 8) + at), from + row * stride + at, row < n_there);
    }
}

// sums[m][j] += A B^T: rows of A are this warp's 16 * M, rows of B are the N of a tile, both D wide.
template <class T, u32 D, u32 M, u32 N>
__device__ __forceinline__ void scores_of(float (&sums)[M][N / 8][4], const u16* a_rows, const u16* b_rows) {
    u32 lane = threadIdx.x % 32;
    SharedAt a_at = a_rows + lane % 16 * (D + 8) + lane / 16 * 8;
    SharedAt b_at = b_rows + (lane / 16 * 8 + lane % 8) * (D + 8) + lane / 8 % 2 * 8;
#pragma unroll
    for (u32 d = 0; d < D; d += 16) {
        u32 a[M][4];
#pragma unroll
        for (u32 m = 0; m < M; m++) ldmatrix(a[m], a_at + (16 * m * (D + 8) + d));
#pragma unroll
        for (u32 j = 0; j < N / 8; j += 2) {
            u32 b[4];
            ldmatrix(b, b_at + (8 * j * (D + 8) + d));
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                mma<T>(sums[m][j], a[m], b[0], b[1]);
                mma<T>(sums[m][j + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// sums[m][j] += round(A) B: A is what `scores_of` gave, made into shares, B a tile of N rows.
template <class T, u32 D, u32 M, u32 N>
__device__ __forceinline__ void add_products(float (&sums)[M][D / 8][4], const float (&shares)[M][N / 8][4], const u16* b_rows) {
    u32 lane = threadIdx.x % 32;
    SharedAt b_at = b_rows + lane % 16 * (D + 8) + lane / 16 * 8;
#pragma unroll
    for (u32 i = 0; i < N / 8; i += 2) {
        // Where a product leaves two tiles of C, the next one takes A.
        u32 a[M][4];
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 half = 0; half < 4; half++) {
                const float* two = &shares[m][i + half / 2][half % 2 * 2];
                a[m][half] = pack<T>(two[0], two[1]);
            }
        }
#pragma unroll
        for (u32 j = 0; j < D / 8; j += 2) {
            u32 b[4];
            ldmatrix_turned(b, b_at + (8 * i * (D + 8) + 8 * j));
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                mma<T>(sums[m][j], a[m], b[0], b[1]);
                mma<T>(sums[m][j + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Takes the scores of keys beyond their queries away, in a product whose rows are queries from `position` on, its columns keys from
// `from` on.
template <u32 M, u32 N> __device__ __forceinline__ void hide_later(float (&s)[M][N / 8][4], u32 from, u32 position) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 i = 0; i < N / 2; i++) {
            u32 key = from + i / 4 * 8 + lane % 4 * 2 + i % 2, query = position + 16 * m + lane / 4 + i / 2 % 2 * 8;
            if (key > query) s[m][i / 4][i % 4] = -INFINITE;
        }
    }
}

// Rounds this warp's 16 * M rows into its own part of a tile, and writes from there those below n_there in runs of 16 bytes.
template <class T, u32 D, u32 M>
__device__ __forceinline__ void write_rows(u16* tile, float (&sums)[M][D / 8][4], u16* to, u32 stride, u32 n_there) {
    u32 lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 j = 0; j < D / 8; j++) {
            u16* at = tile + (16 * m + lane / 4) * (D + 8) + 8 * j + lane % 4 * 2;
            *(u32*)at = pack<T>(sums[m][j][0], sums[m][j][1]);
            *(u32*)(at + 8 * (D + 8)) = pack<T>(sums[m][j][2], sums[m][j][3]);
        }
    }
    __syncwarp();
#pragma unroll
    for (u32 i = 0; i < 16 * M * (D / 8); i += 32) {
        u32 row = (i + lane) / (D / 8), at = (i + lane) % (D / 8) * 8;
        if (row < n_there) *(uint4*)(to + row * stride + at) = *(const uint4*)(tile + row * (D + 8) + at);
    }
}

__device__ __forceinline__ u32 rest_of(u32 n, u32 taken) { return n > taken ? n - taken : 0; }

// Launch: 128 threads, a block for each query head (x) and each run of 64 * M queries (y), `slots` of them; shared memory: a tile of
// queries and four of N keys. Long runs of keys come first.
template <class T, u32 D, u32 M, u32 N>
__device__ __forceinline__ void attention_mma(const u16* qkv, const u32* starts, u32 n_examples, u32 n, u32 n_q, u32 n_kv, float scale,
                                              const u32* past, const u16* cache, u32 capacity, u16* out, float* lse) {
    const u32 ROWS = 64 * M, LINE = D + 8;
    SHARED_BYTES(shared);
    u16* q = (u16*)shared;
    u16* tiles = q + ROWS * LINE; // keys, values; and again
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 head = blockIdx.x, kv_head = head / (n_q / n_kv), width = (n_q + 2 * n_kv) * D, d_kv = n_kv * D;
    u32 first;
    Span span = run_of(starts, n_examples, n, gridDim.y - 1 - blockIdx.y, ROWS, first);
    KeyRows<T> keys = key_rows<T>(qkv, span, width, d_kv, past, cache, capacity);
    u32 length = span.end - span.start;
    if (past && length > capacity - keys.before) length = capacity - keys.before;
    if (first >= length) return;
    u32 n_rows = length - first < ROWS ? length - first : ROWS, n_keys = keys.before + first + n_rows;
    u32 n_tiles = (n_keys + N - 1) / N;
    const u16* k = keys.k + kv_head * D;
    auto fetch_keys = [&](u32 tile) {
        u16* to = tiles + tile % 2 * 2 * N * LINE;
        const u16* from = k + (u64)tile * N * keys.stride;
        fetch<D, N>(to, from, keys.stride, n_keys - tile * N);
        fetch<D, N>(to + N * LINE, from + d_kv, keys.stride, n_keys - tile * N);
    };
    fetch<D, ROWS>(q, qkv + (u64)(span.start + first) * width + head * D, width, n_rows);
    fetch_keys(0);
    u16* own_q = q + warp * 16 * M * LINE;
    u32 position = keys.before + first + warp * 16 * M; // of this warp's first query
    float scale_2 = scale * LOG2_E, sums[M][D / 8][4] = {}, most[M][2], total[M][2] = {};
#pragma unroll
    for (u32 m = 0; m < M; m++) most[m][0] = most[m][1] = -INFINITE;
    for (u32 tile = 0; tile < n_tiles; tile++) {
        copies_done();
        __syncthreads(); // the tile is there, and nobody reads the one before it
        if (tile + 1 < n_tiles) fetch_keys(tile + 1);
        u32 from = tile * N;
        if (from >= position + 16 * M) continue; // no query of this warp sees it
        const u16* k_tile = tiles + tile % 2 * 2 * N * LINE;
        float s[M][N / 8][4] = {};
        scores_of<T, D, M, N>(s, own_q, k_tile);
        if (from + N > position) hide_later<M, N>(s, from, position);
        float before[M][2];
        bool is_same = true;
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) { // rows g and g + 8
                float largest = most[m][half];
#pragma unroll
                for (u32 j = 0; j < N / 8; j++) largest = fmaxf(largest, fmaxf(s[m][j][2 * half], s[m][j][2 * half + 1]));
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
                is_same &= largest == most[m][half];
                before[m][half] = power_of_2((most[m][half] - largest) * scale_2);
                most[m][half] = largest;
                float shift = -largest * scale_2, sum = 0.0f;
#pragma unroll
                for (u32 j = 0; j < N / 8; j++) {
#pragma unroll
                    for (u32 i = 2 * half; i < 2 * half + 2; i++) {
                        s[m][j][i] = power_of_2(fmaf(s[m][j][i], scale_2, shift));
                        sum += s[m][j][i];
                    }
                }
                total[m][half] = fmaf(total[m][half], before[m][half], sum);
            }
        }
        // Where no row has a new largest score, the factors are all one.
        if (__ballot_sync(ALL_LANES, is_same) != ALL_LANES) {
#pragma unroll
            for (u32 m = 0; m < M; m++) {
#pragma unroll
                for (u32 j = 0; j < D / 8; j++) {
#pragma unroll
                    for (u32 i = 0; i < 4; i++) sums[m][j][i] *= before[m][i / 2];
                }
            }
        }
        add_products<T, D, M, N>(sums, s, k_tile + N * LINE);
    }
    u32 own = warp * 16 * M, token = span.start + first + own;
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float sum = total[m][half];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            float share = 1.0f / sum;
#pragma unroll
            for (u32 j = 0; j < D / 8; j++) sums[m][j][2 * half] *= share, sums[m][j][2 * half + 1] *= share;
            u32 row = 16 * m + lane / 4 + 8 * half;
            if (lse && lane % 4 == 0 && own + row < n_rows) {
                lse[(u64)(token + row) * n_q + head] = fmaf(most[m][half], scale, logf(sum));
            }
        }
    }
    write_rows<T, D, M>(own_q, sums, out + ((u64)token * n_q + head) * D, n_q * D, rest_of(n_rows, own));
}

// Launch: as above, a run has 64 queries; shared memory: tiles of queries and of their dO, and four of N keys.
template <class T, u32 D, u32 N>
__device__ __forceinline__ void attention_dq_mma(const u16* qkv, const u16* dout, const float* lse, const float* delta,
                                                 const u32* starts, u32 n_examples, u32 n, u32 n_q, u32 n_kv, float scale, u16* dqkv) {
    const u32 ROWS = 64, LINE = D + 8;
    SHARED_BYTES(shared);
    u16* q = (u16*)shared;
    u16* of_out = q + ROWS * LINE;
    u16* tiles = of_out + ROWS * LINE; // keys, values; and again
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 head = blockIdx.x, kv_head = head / (n_q / n_kv), width = (n_q + 2 * n_kv) * D, d_q = n_q * D, d_kv = n_kv * D;
    u32 first;
    Span span = run_of(starts, n_examples, n, gridDim.y - 1 - blockIdx.y, ROWS, first);
    if (first >= span.end - span.start) return;
    u32 length = span.end - span.start, n_rows = length - first < ROWS ? length - first : ROWS, n_keys = first + n_rows;
    u32 n_tiles = (n_keys + N - 1) / N, own = 16 * warp, token = span.start + first + own;
    const u16* k = qkv + (u64)span.start * width + d_q + kv_head * D;
    auto fetch_keys = [&](u32 tile) {
        u16* to = tiles + tile % 2 * 2 * N * LINE;
        const u16* from = k + (u64)tile * N * width;
        fetch<D, N>(to, from, width, n_keys - tile * N);
        fetch<D, N>(to + N * LINE, from + d_kv, width, n_keys - tile * N);
    };
    fetch<D, ROWS>(q, qkv + (u64)(span.start + first) * width + head * D, width, n_rows);
    fetch<D, ROWS>(of_out, dout + (u64)(span.start + first) * d_q + head * D, d_q, n_rows);
    fetch_keys(0);
    float scale_2 = scale * LOG2_E, sums[1][D / 8][4] = {}, shift[2], along[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        u32 row = lane / 4 + 8 * half;
        u64 at = (u64)(token + row) * n_q + head;
        shift[half] = own + row < n_rows ? -lse[at] * LOG2_E : 0.0f;
        along[half] = own + row < n_rows ? delta[at] : 0.0f;
    }
    for (u32 tile = 0; tile < n_tiles; tile++) {
        copies_done();
        __syncthreads();
        if (tile + 1 < n_tiles) fetch_keys(tile + 1);
        u32 from = tile * N, position = first + own;
        if (from >= position + 16) continue;
        const u16* k_tile = tiles + tile % 2 * 2 * N * LINE;
        float s[1][N / 8][4] = {}, ds[1][N / 8][4] = {};
        scores_of<T, D, 1, N>(s, q + own * LINE, k_tile);
        scores_of<T, D, 1, N>(ds, of_out + own * LINE, k_tile + N * LINE);
        if (from + N > position) hide_later<1, N>(s, from, position);
#pragma unroll
        for (u32 i = 0; i < N / 2; i++) {
            u32 half = i / 2 % 2;
            float share = power_of_2(fmaf(s[0][i / 4][i % 4], scale_2, shift[half]));
            ds[0][i / 4][i % 4] = share * (ds[0][i / 4][i % 4] - along[half]);
        }
        add_products<T, D, 1, N>(sums, ds, k_tile);
    }
#pragma unroll
    for (u32 j = 0; j < D / 8; j++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) sums[0][j][i] *= scale;
    }
    write_rows<T, D, 1>(q + own * LINE, sums, dqkv + (u64)token * width + head * D, width, rest_of(n_rows, own));
}

// The query heads of a key head in order, and tiles of N queries of each in order. Launch: 128 threads, a block for each key head (x)
// and each run of 64 keys (y); shared memory: tiles of keys and values, four of N queries and dO, and four rows of N floats.
template <class T, u32 D, u32 N>
__device__ __forceinline__ void attention_dkv_mma(const u16* qkv, const u16* dout, const float* lse, const float* delta,
                                                  const u32* starts, u32 n_examples, u32 n, u32 n_q, u32 n_kv, float scale, u16* dqkv) {
    const u32 ROWS = 64, LINE = D + 8;
    SHARED_BYTES(shared);
    u16* k = (u16*)shared;
    u16* v = k + ROWS * LINE;
    u16* tiles = v + ROWS * LINE;                 // queries, dO; and again
    float* rows = (float*)(tiles + 4 * N * LINE); // lse, delta; and again
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 kv_head = blockIdx.x, group = n_q / n_kv, width = (n_q + 2 * n_kv) * D, d_q = n_q * D, d_kv = n_kv * D;
    u32 first;
    Span span = run_of(starts, n_examples, n, blockIdx.y, ROWS, first);
    if (first >= span.end - span.start) return;
    u32 length = span.end - span.start, n_rows = length - first < ROWS ? length - first : ROWS;
    u32 per_head = (length - first + N - 1) / N, n_tiles = group * per_head, own = 16 * warp;
    u32 next_head = kv_head * group, next_from = 0; // what comes next: a head, and queries from `first` on
    auto fetch_queries = [&](u32 tile) {
        u64 token = span.start + first + next_from;
        u32 n_there = length - first - next_from;
        u16* to = tiles + tile % 2 * 2 * N * LINE;
        fetch<D, N>(to, qkv + token * width + next_head * D, width, n_there);
        fetch<D, N>(to + N * LINE, dout + token * d_q + next_head * D, d_q, n_there);
        u32 row = threadIdx.x % N, which = threadIdx.x / N;
        if (which < 2) {
            const float* from = (which ? delta : lse) + (token + row) * n_q + next_head;
            copy_4((const u16*)(rows + tile % 2 * 2 * N + threadIdx.x), from, row < n_there);
        }
        next_from += N;
        if (next_from >= length - first) next_from = 0, next_head++;
    };
    const u16* from_k = qkv + (u64)(span.start + first) * width + d_q + kv_head * D;
    fetch<D, ROWS>(k, from_k, width, n_rows);
    fetch<D, ROWS>(v, from_k + d_kv, width, n_rows);
    fetch_queries(0);
    float scale_2 = scale * LOG2_E, dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
    for (u32 tile = 0; tile < n_tiles; tile++) {
        copies_done();
        __syncthreads();
        u32 from = next_from >= N ? next_from - N : (per_head - 1) * N; // of the tile that is there
        if (tile + 1 < n_tiles) fetch_queries(tile + 1);
        if (from + N <= own) continue; // no query sees a key of this warp
        const u16* q_tile = tiles + tile % 2 * 2 * N * LINE;
        const float* of_rows = rows + tile % 2 * 2 * N;
        float s[1][N / 8][4] = {}, ds[1][N / 8][4] = {};
        scores_of<T, D, 1, N>(s, k + own * LINE, q_tile);
        if (from < own + 16) {
#pragma unroll
            for (u32 i = 0; i < N / 2; i++) {
                u32 query = from + i / 4 * 8 + lane % 4 * 2 + i % 2, key = own + lane / 4 + i / 2 % 2 * 8;
                if (key > query) s[0][i / 4][i % 4] = -INFINITE;
            }
        }
#pragma unroll
        for (u32 i = 0; i < N / 2; i++) {
            u32 at = i / 4 * 8 + lane % 4 * 2 + i % 2;
            s[0][i / 4][i % 4] = power_of_2(fmaf(s[0][i / 4][i % 4], scale_2, -of_rows[at] * LOG2_E));
        }
        add_products<T, D, 1, N>(dv, s, q_tile + N * LINE);
        scores_of<T, D, 1, N>(ds, v + own * LINE, q_tile + N * LINE);
#pragma unroll
        for (u32 i = 0; i < N / 2; i++) {
            u32 at = i / 4 * 8 + lane % 4 * 2 + i % 2;
            ds[0][i / 4][i % 4] = s[0][i / 4][i % 4] * (ds[0][i / 4][i % 4] - of_rows[N + at]);
        }
        add_products<T, D, 1, N>(dk, ds, q_tile);
    }
#pragma unroll
    for (u32 j = 0; j < D / 8; j++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) dk[0][j][i] *= scale;
    }
    u16* to = dqkv + (u64)(span.start + first + own) * width + d_q + kv_head * D;
    write_rows<T, D, 1>(k + own * LINE, dk, to, width, rest_of(n_rows, own));
    write_rows<T, D, 1>(v + own * LINE, dv, to + d_kv, width, rest_of(n_rows, own));
}

// The kernels of a type and a width: queries of a run in 64s, keys of a tile there, and on the way back keys and queries of a tile.
#define ATTENTION_MMA(T, NAME, D, M, N, N_DQ, N_DKV)                                                                       \
    extern "C" __global__ void __launch_bounds__(MMA_THREADS) attention_mma_##NAME##_##D(                                  \
        const u16* qkv, const u32* starts, u32 n_examples, u32 n, u32 n_q, u32 n_kv, float scale, const u32* past,         \
        const u16* cache, u32 capacity, u16* out, float* lse) {                                                            \
        attention_mma<T, D, M, N>(qkv, starts, n_examples, n, n_q, n_kv, scale, past, cache, capacity, out, lse);          \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(MMA_THREADS, 3) attention_dq_mma_##NAME##_##D(                            \
        const u16* qkv, const u16* dout, const float* lse, const float* delta, const u32* starts, u32 n_examples, u32 n,   \
        u32 n_q, u32 n_kv, float scale, u16* dqkv) {                                                                       \
        attention_dq_mma<T, D, N_DQ>(qkv, dout, lse, delta, starts, n_examples, n, n_q, n_kv, scale, dqkv);                \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(MMA_THREADS, D <= 80 ? 3 : 2) attention_dkv_mma_##NAME##_##D(             \
        const u16* qkv, const u16* dout, const float* lse, const float* delta, const u32* starts, u32 n_examples, u32 n,   \
        u32 n_q, u32 n_kv, float scale, u16* dqkv) {                                                                       \
        attention_dkv_mma<T, D, N_DKV>(qkv, dout, lse, delta, starts, n_examples, n, n_q, n_kv, scale, dqkv);              \
    }
