// The k largest keys of each row.      Judge: backend::portable::topk_rows
//   rows       (n_rows, d_in)  elements of 16 or 32 bits; a key is an element's bits under `mask`, its magnitude
//   columns    (n_rows, k)     out, ascending within a row; equal keys are settled in favour of the lower column
//   first_nan  one number      row << 32 | column of the first key above `largest`, where there is one
// 16-bit keys have 15 bits and d_in is at most 131,072: key and column fit one word of 32 bits, larger words are chosen first.
// Rows that begin at a multiple of 16 bytes are read 16 bytes per lane; any others element by element.
#include "common.cuh"

// A key and its column as one number: larger key first, then lower column. Zero is no entry that can be chosen.
template <class Key> struct Pack;

template <> struct Pack<u16> {
    typedef u32 Word;
    static const u32 PER_LOAD = 8;
    static __device__ __forceinline__ u32 word(u32 key, u32 column) { return key << 17 | (0x1ffff - column); }
    static __device__ __forceinline__ u32 column(u32 word) { return 0x1ffff - (word & 0x1ffff); }
    static __device__ __forceinline__ u32 key_at(const uint4& four, u32 j, u32 mask) {
        u32 two = j / 2 == 0 ? four.x : j / 2 == 1 ? four.y : j / 2 == 2 ? four.z : four.w;
        return (two >> 16 * (j % 2)) & mask;
    }
    static __device__ __forceinline__ u32 max_key(const uint4& four, u32 mask) {
        u32 masks = mask << 16 | mask;
        u32 max = __vmaxu2(__vmaxu2(four.x & masks, four.y & masks), __vmaxu2(four.z & masks, four.w & masks));
        return (max & 0xffff) > (max >> 16) ? max & 0xffff : max >> 16;
    }
};

template <> struct Pack<u32> {
    typedef u64 Word;
    static const u32 PER_LOAD = 4;
    static __device__ __forceinline__ u64 word(u32 key, u32 column) { return (u64)key << 32 | ~column; }
    static __device__ __forceinline__ u32 column(u64 word) { return ~(u32)word; }
    static __device__ __forceinline__ u32 key_at(const uint4& four, u32 j, u32 mask) {
        return (j == 0 ? four.x : j == 1 ? four.y : j == 2 ? four.z : four.w) & mask;
    }
    static __device__ __forceinline__ u32 max_key(const uint4& four, u32 mask) {
        u32 a = four.x & mask, b = four.y & mask, c = four.z & mask, d = four.w & mask;
        a = a > b ? a : b;
        c = c > d ? c : d;
        return a > c ? a : c;
    }
};

template <class Word> __device__ __forceinline__ Word max_of(Word a, Word b) { return a > b ? a : b; }
template <class Word> __device__ __forceinline__ Word min_of(Word a, Word b) { return a < b ? a : b; }

// One step of a bitonic network over the lanes of a warp: lanes `distance` apart end in the order asked for.
template <class Word>
__device__ __forceinline__ Word compare_exchange(Word mine, u32 distance, bool larger_below, u32 lane) {
    Word other = __shfl_xor_sync(ALL_LANES, mine, distance);
    bool is_below = (lane & distance) == 0;
    return is_below == larger_below ? max_of(mine, other) : min_of(mine, other);
}

// Sorts one word per lane, ascending.
template <class Word> __device__ __forceinline__ Word sort_ascending(Word mine, u32 lane) {
#pragma unroll
    for (u32 size = 2; size <= 32; size *= 2) {
#pragma unroll
        for (u32 distance = size / 2; distance > 0; distance /= 2) {
            mine = compare_exchange(mine, distance, (lane & size) != 0 && size < 32, lane);
        }
    }
    return mine;
}

// The 32 largest words that a warp has seen: lane i holds the i-th. Candidates wait in shared memory until there are 32.
template <class Word> struct Best {
    Word sorted;      // descending over the lanes
    Word bound;       // the k-th: nothing below it can be chosen
    u32 n_waiting;    // the same in every lane
    Word* waiting;    // 64 places
    u32 k, lane;

    __device__ __forceinline__ Best(Word* places, u32 k_, u32 lane_)
        : sorted(0), bound(0), n_waiting(0), waiting(places), k(k_), lane(lane_) {}

    // Every lane of the warp calls this, with a word or without.
    __device__ __forceinline__ void offer(Word word, bool has_word) {
        u32 votes = __ballot_sync(ALL_LANES, has_word);
        if (votes == 0) return;
        if (has_word) waiting[n_waiting + __popc(votes & ((1u << lane) - 1))] = word;
        n_waiting += __popc(votes);
        __syncwarp();
        if (n_waiting < 32) return;
        merge(waiting[lane]);
        n_waiting -= 32;
        Word rest = lane < n_waiting ? waiting[32 + lane] : 0;
        __syncwarp();
        waiting[lane] = rest;
        __syncwarp();
    }

    __device__ __forceinline__ void flush() {
        Word word = lane < n_waiting ? waiting[lane] : 0;
        __syncwarp();
        merge(word);
        n_waiting = 0;
    }

    // Of two sorted halves the larger of each pair are the 32 largest; five steps sort them again.
    __device__ __forceinline__ void merge(Word word) {
        sorted = max_of(sorted, sort_ascending(word, lane));
#pragma unroll
        for (u32 distance = 16; distance > 0; distance /= 2) {
            sorted = compare_exchange(sorted, distance, true, lane);
        }
        bound = __shfl_sync(ALL_LANES, sorted, k - 1);
    }
};

__device__ __forceinline__ bool is_aligned(const void* at) { return ((u64)at & 15) == 0; }

// Up to four loads of a warp, from a column on: all are on their way before the first is looked at. How many fit the row.
template <class Key>
__device__ __forceinline__ u32 load_some(const Key* keys, u32 column, u32 d_in, u32 lane, uint4 (&loads)[4]) {
    const u32 STEP = 32 * Pack<Key>::PER_LOAD;
    u32 n_loads = min_of((d_in - column) / STEP, 4u);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (i < n_loads) loads[i] = *(const uint4*)(keys + column + i * STEP + lane * Pack<Key>::PER_LOAD);
    }
    return n_loads;
}

// k <= 32: one warp per row. Most groups of columns hold nothing above the bound, which one maximum tells.
// Launch: 256 threads, 8 rows per block; shared memory: 64 words for each warp.
template <class Key>
__device__ __forceinline__ void topk_warp(const Key* rows, u32 n_rows, u32 d_in, u32 k, u32 mask, u32 largest, u32* columns,
                                          u64* first_nan) {
    typedef Pack<Key> P;
    typedef typename P::Word Word;
    const u32 STEP = 32 * P::PER_LOAD;
    SHARED_BYTES(shared);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 row = (u64)blockIdx.x * (blockDim.x / 32) + warp;
    if (row >= n_rows) return; // whole warps leave; no barrier below waits for them
    const Key* keys = rows + row * d_in;
    Best<Word> best((Word*)shared + 64 * warp, k, lane);
    u32 column = 0;
    if (is_aligned(keys)) {
        while (column + STEP <= d_in) {
            uint4 loads[4];
            u32 n_loads = load_some(keys, column, d_in, lane, loads);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                if (i >= n_loads) break;
                u32 first = column + i * STEP + lane * P::PER_LOAD;
                u32 most = P::max_key(loads[i], mask);
                bool may_have = P::word(most, first) > best.bound;
                if (__ballot_sync(ALL_LANES, may_have) == 0) continue;
                // The first NaN of a lane is seen: no number's key is above it.
                if (most > largest) {
                    for (u32 j = P::PER_LOAD; j-- > 0;) {
                        if (P::key_at(loads[i], j, mask) > largest) report_nan(first_nan, row, first + j);
                    }
                }
#pragma unroll 1
                for (u32 j = 0; j < P::PER_LOAD; j++) { // rare: short code is worth more than fast code
                    u32 key = P::key_at(loads[i], j, mask);
                    Word word = P::word(key, first + j);
                    best.offer(word, word > best.bound && key <= largest);
                }
            }
            column += n_loads * STEP;
        }
    }
    for (; column < d_in; column += 32) {
        u32 mine = column + lane;
        u32 key = mine < d_in ? keys[mine] & mask : 0;
        if (key > largest) report_nan(first_nan, row, mine);
        Word word = P::word(key, mine);
        best.offer(word, mine < d_in && word > best.bound && key <= largest);
    }
    best.flush();
    u32 chosen = lane < k ? P::column(best.sorted) : 0xffffffff;
    chosen = sort_ascending(chosen, lane);
    if (lane < k) columns[row * k + lane] = chosen;
}

// k = 1: one warp per row, no list. Launch: 256 threads, 8 rows per block.
template <class Key>
__device__ __forceinline__ void top1_warp(const Key* rows, u32 n_rows, u32 d_in, u32 mask, u32 largest, u32* columns,
                                          u64* first_nan) {
    typedef Pack<Key> P;
    typedef typename P::Word Word;
    const u32 STEP = 32 * P::PER_LOAD;
    u32 lane = threadIdx.x % 32;
    u64 row = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= n_rows) return;
    const Key* keys = rows + row * d_in;
    Word best = 0;
    u32 column = 0;
    if (is_aligned(keys)) {
        while (column + STEP <= d_in) {
            uint4 loads[4];
            u32 n_loads = load_some(keys, column, d_in, lane, loads);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                if (i >= n_loads) break;
                u32 first = column + i * STEP + lane * P::PER_LOAD;
                if (P::word(P::max_key(loads[i], mask), first) <= best) continue;
#pragma unroll
                for (u32 j = 0; j < P::PER_LOAD; j++) {
                    u32 key = P::key_at(loads[i], j, mask);
                    if (key > largest) report_nan(first_nan, row, first + j);
                    else best = max_of(best, P::word(key, first + j));
                }
            }
            column += n_loads * STEP;
        }
    }
    for (u32 mine = column + lane; mine < d_in; mine += 32) {
        u32 key = keys[mine] & mask;
        if (key > largest) report_nan(first_nan, row, mine);
        else best = max_of(best, P::word(key, mine));
    }
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) {
        best = max_of(best, __shfl_xor_sync(ALL_LANES, best, distance));
    }
    if (lane == 0) columns[row] = P::column(best);
}

// Hands every key of a row to the thread of a block that it falls to, with its column: 16 bytes at once where rows are aligned.
template <class Key, class Visit>
__device__ __forceinline__ void for_each_key(const Key* keys, u32 d_in, u32 mask, Visit visit) {
    typedef Pack<Key> P;
    const u32 STEP = 256 * P::PER_LOAD;
    u32 column = 0;
    if (is_aligned(keys)) {
        for (; column + STEP <= d_in; column += STEP) {
            u32 first = column + threadIdx.x * P::PER_LOAD;
            uint4 load = *(const uint4*)(keys + first);
#pragma unroll
            for (u32 j = 0; j < P::PER_LOAD; j++) visit(P::key_at(load, j, mask), first + j);
        }
    }
    for (column += threadIdx.x; column < d_in; column += 256) visit(keys[column] & mask, column);
}

// The `left`-th largest of the keys that the threads of a block feed, found eight bits at a time from counts in shared memory;
// `left` becomes how many of the keys equal to it belong to the largest. `feed(count)` calls `count` with each key of a thread.
template <class Key, class Feed>
__device__ __forceinline__ u32 find_cut(u32* counts, u32* found, u32& left, Feed feed) {
    u32 thread = threadIdx.x, lane = thread % 32;
    u32 cut = 0;
    for (int shift = 8 * (int)sizeof(Key) - 8; shift >= 0; shift -= 8) {
        counts[thread] = 0;
        __syncthreads();
        feed([&](u32 key) {
            if ((u64)key >> (shift + 8) == cut) atomicAdd(&counts[key >> shift & 255], 1u);
        });
        __syncthreads();
        if (thread < 32) {
            // A lane has eight digits; `above` counts the keys of all higher lanes.
            u32 mine = 0;
            for (u32 digit = 8 * lane; digit < 8 * lane + 8; digit++) mine += counts[digit];
            u32 from_here = mine;
            for (u32 distance = 1; distance < 32; distance *= 2) {
                u32 other = __shfl_down_sync(ALL_LANES, from_here, distance);
                if (lane + distance < 32) from_here += other;
            }
            u32 above = from_here - mine;
            if (above < left && left <= from_here) {
                u32 digit = 8 * lane + 7;
                while (above + counts[digit] < left) above += counts[digit--];
                found[0] = digit;
                found[1] = left - above;
            }
        }
        __syncthreads();
        cut = cut << 8 | found[0];
        left = found[1];
        __syncthreads();
    }
    return cut;
}

// Any k: one block per row. Where k threads hold a key not below a bound, nothing below it is chosen: for k <= 256 the k-th
// largest of the threads' maxima is one, and few keys are left to count. A last pass writes what lies above the k-th largest
// key, and of its equals the first. All passes but the first find the row in the cache.
// Launch: 256 threads, one block per row; shared memory: 256 counts, 16 sums and 2 results, of 4 bytes each.
template <class Key>
__device__ __forceinline__ void topk_block(const Key* rows, u32 d_in, u32 k, u32 mask, u32 largest, u32* columns,
                                           u64* first_nan) {
    typedef Pack<Key> P;
    SHARED_BYTES(shared);
    u32* counts = (u32*)shared;
    u32* above_of = counts + 256; // per warp
    u32* ties_of = above_of + 8;  // per warp
    u32* found = ties_of + 8;     // the digit, and how many to choose of the keys that begin so
    u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    u64 row = blockIdx.x;
    const Key* keys = rows + row * d_in;
    u32 most = 0;
    for_each_key<Key>(keys, d_in, mask, [&](u32 key, u32 column) {
        if (key > largest) report_nan(first_nan, row, column);
        most = max_of(most, key);
    });
    u32 bound = 0;
    if (k <= 256) {
        u32 rank = k;
        bound = find_cut<Key>(counts, found, rank, [&](auto count) { count(most); });
    }
    u32 left = k;
    u32 cut = find_cut<Key>(counts, found, left, [&](auto count) {
        for_each_key<Key>(keys, d_in, mask, [&](u32 key, u32) {
            if (key >= bound) count(key);
        });
    });
    // Tiles in the order of columns; a thread has as many columns next to each other as it loads at once.
    u32* chosen = columns + row * k;
    u32 n_chosen = 0, per = is_aligned(keys) ? P::PER_LOAD : 1;
    for (u32 tile = 0; tile < d_in && n_chosen < k; tile += 256 * per) {
        u32 first = tile + thread * per, end = min_of(first + per, d_in);
        u32 own_above = 0, own_ties = 0; // a bit for each column
        if (per > 1 && first + per <= d_in) {
            uint4 load = *(const uint4*)(keys + first);
#pragma unroll
            for (u32 j = 0; j < P::PER_LOAD; j++) {
                u32 key = P::key_at(load, j, mask);
                own_above |= (u32)(key > cut) << j;
                own_ties |= (u32)(key == cut) << j;
            }
        } else {
            for (u32 column = first; column < end; column++) {
                u32 key = keys[column] & mask;
                own_above |= (u32)(key > cut) << (column - first);
                own_ties |= (u32)(key == cut) << (column - first);
            }
        }
        // Counts of all lanes up to this one.
        u32 above = __popc(own_above), ties = __popc(own_ties);
        for (u32 distance = 1; distance < 32; distance *= 2) {
            u32 other_above = __shfl_up_sync(ALL_LANES, above, distance), other_ties = __shfl_up_sync(ALL_LANES, ties, distance);
            if (lane >= distance) above += other_above, ties += other_ties;
        }
        if (lane == 31) {
            above_of[warp] = above;
            ties_of[warp] = ties;
        }
        __syncthreads();
        above -= __popc(own_above), ties -= __popc(own_ties);
        u32 all_above = 0, all_ties = 0;
        for (u32 w = 0; w < 8; w++) {
            if (w < warp) above += above_of[w], ties += ties_of[w];
            all_above += above_of[w], all_ties += ties_of[w];
        }
        for (u32 both = own_above | own_ties; both != 0; both &= both - 1) {
            u32 j = __ffs(both) - 1;
            bool is_above = own_above >> j & 1;
            if (is_above || ties < left) chosen[n_chosen + above + min_of(ties, left)] = first + j;
            above += is_above;
            ties += !is_above;
        }
        n_chosen += all_above + min_of(all_ties, left);
        left -= min_of(all_ties, left);
        __syncthreads();
    }
}

#define TOPK(KEY, NAME)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) top1_##NAME(const KEY* rows, u32 n_rows, u32 d_in, u32 mask,        \
                                                                  u32 largest, u32* columns, u64* first_nan) {             \
        top1_warp<KEY>(rows, n_rows, d_in, mask, largest, columns, first_nan);                                             \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) topk_warp_##NAME(const KEY* rows, u32 n_rows, u32 d_in, u32 k,      \
                                                                       u32 mask, u32 largest, u32* columns,                \
                                                                       u64* first_nan) {                                   \
        topk_warp<KEY>(rows, n_rows, d_in, k, mask, largest, columns, first_nan);                                          \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) topk_block_##NAME(const KEY* rows, u32 d_in, u32 k, u32 mask,       \
                                                                        u32 largest, u32* columns, u64* first_nan) {       \
        topk_block<KEY>(rows, d_in, k, mask, largest, columns, first_nan);                                                 \
    }

TOPK(u16, u16)
TOPK(u32, u32)
