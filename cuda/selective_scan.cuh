// The selective scan (S6), forward and backward; mfuser/ops/selective_scan/reference.py has the equations.
//
// A channel's states lie in the registers of G neighbouring lanes, S = 4 in each, and a lane serves K channels: what it reads
// of B and C from shared memory serves them all, and so many independent recurrences hide the latency of one. The sequence
// is cut into chunks that run side by side in two passes: the first gives what
// each chunk hands on when it starts from zero (`end`) and how long it lasts (`total`, the sum of delta: the decay over
// a chunk is exp(A total)); in the second every chunk folds the summaries of those before it into its own start. With
// enough sequences to fill the GPU there is one chunk and no first pass. The backward does the same from the other end.
//
// What is per step and channel (loads, softplus, gate, stores) is done once, by the warp that has the channel, with channels
// along the lanes, and meets the lanes of the recurrence in shared memory. Rows of B and C serve all warps of a block: two
// buffers take turns, so that a tile of steps has one barrier.
//
// The forward keeps the states at every kSub-th step. The backward runs kHold steps forward from there, holding the states
// in registers, then walks them back. Sums over channels (dB, dC) go by shuffles over the warp's channels,
// by shared memory over the block's, and by `finish` over the blocks, always in the same order.
#pragma once

#include "device.cuh"
#include "selective_scan.h"

namespace {

constexpr int S = 4;               // states in a lane: what one vector load brings
constexpr int kSub = 16;           // steps between kept states
constexpr int kHold = 8;           // states that the backward holds at a time: a lane's registers bound it
constexpr int kLinger = 4;         // steps back whose results are stored together
constexpr int kByHand = 1;         // exponentials of a step that the first pass, which waits for their unit, computes without
constexpr int kForwardWarps = 4;   // warps per block
constexpr int kBackwardWarps = 4;
constexpr int kForwardBlocks = 4, kBackwardBlocks = 2;  // per SM: bounds the registers
// steps staged at a time in the forward, a multiple of kSub: they wait in registers
template <typename T>
constexpr int kTile = sizeof(T) == 4 ? 16 : 32;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLog2eLow = 1.92596299e-8f;  // log2(e) - kLog2e in fp32
constexpr float kLn2 = 0.6931471805599453f;
constexpr unsigned kAll = 0xffffffffu;

// 2^x, for x above -126, without the unit of the exponentials: 2^round(x) put into the exponent of 2^(x - round(x)), which is a
// polynomial, within 2.5e-7 and exact at 0.
__device__ __forceinline__ float exp2_by_hand(float x) {
    x = fmaxf(x, -126.0f);
    const float shifted = x + 12582912.0f;  // 1.5 * 2^23: the last bits are round(x)
    const float f = x - (shifted - 12582912.0f);
    float p = fmaf(f, 0.00132647273f, 0.00967151299f);
    p = fmaf(f, p, 0.0555073358f);
    p = fmaf(f, p, 0.240222424f);
    p = fmaf(f, p, 0.693147004f);
    p = fmaf(f, p, 1.0f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

// What softplus and its slope are made of: exp(-|x|). EXACT: to fp32 accuracy, also where it is tiny; else to 2^-18,
// which is far below what bf16 and fp16 inputs carry.
template <bool EXACT>
__device__ __forceinline__ float exp_minus_abs(float x) {
    const float m = -fabsf(x), whole = m * kLog2e, e = exp2_fast(whole);
    if (!EXACT) return e;
    const float rest = fmaf(m, kLog2e, -whole) + m * kLog2eLow;
    return fmaf(e, rest * kLn2, e);
}

// max(x, 0) + log1p(e) with e = exp(-|x|). EXACT: log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3, as a series; else e times a
// polynomial, within 1.4e-6, which leaves the unit of the exponentials alone.
template <bool EXACT>
__device__ __forceinline__ float softplus_of(float x, float e) {
    if (!EXACT) {
        float p = 0.0141407046f;
        p = fmaf(e, p, -0.0664007887f);
        p = fmaf(e, p, 0.149222657f);
        p = fmaf(e, p, -0.235037893f);
        p = fmaf(e, p, 0.331094295f);
        p = fmaf(e, p, -0.499869645f);
        p = fmaf(e, p, 0.999998748f);
        return fmaf(e, p, fmaxf(x, 0.0f));
    }
    const float s = e * rcp_fast(2.0f + e), q = s * s;
    float series = fmaf(q, 1.0f / 13, 1.0f / 11);
    series = fmaf(q, series, 1.0f / 9);
    series = fmaf(q, series, 1.0f / 7);
    series = fmaf(q, series, 1.0f / 5);
    series = fmaf(q, series, 1.0f / 3);
    series = fmaf(q, series, 1.0f);
    return fmaf(2.0f * s, series, fmaxf(x, 0.0f));
}

// e = exp(-|x|)
__device__ __forceinline__ float sigmoid_of(float x, float e) { return rcp_fast(1.0f + e) * (x >= 0.0f ? 1.0f : e); }
template <bool EXACT>
__device__ __forceinline__ float sigmoid(float x) {
    return sigmoid_of(x, exp_minus_abs<EXACT>(x));
}

// A sum over a whole sequence, to about the accuracy of one addition (Kahan 1965).
struct LongSum {
    float sum = 0.0f, lost = 0.0f;
    __device__ __forceinline__ void add(float x) {
        const float wanted = x - lost, next = sum + wanted;
        lost = (next - sum) - wanted;
        sum = next;
    }
};

// Sums p[0..V) over W lanes that are `stride` apart, halving the values with the lanes: every lane ends with V / W sums,
// or with one where V < W (then lanes `index` apart by V hold the same). `index`: this lane among the W.
// Returns the index in p of the first sum that this lane holds.
template <int V, int W, int STRIDE>
__device__ __forceinline__ int sum_over_lanes(float* p, int index) {
    int first = 0;
    if constexpr (W > 1) {
        constexpr int half = W / 2;
        if constexpr (V > 1) {
            const bool upper = index & half;
#pragma unroll
            for (int i = 0; i < V / 2; i++) {
                const float keep = upper ? p[i + V / 2] : p[i];
                const float give = upper ? p[i] : p[i + V / 2];
                p[i] = keep + __shfl_xor_sync(kAll, give, half * STRIDE);
            }
            first = (upper ? V / 2 : 0) + sum_over_lanes<V / 2, half, STRIDE>(p, index);
        } else {
            p[0] += __shfl_xor_sync(kAll, p[0], half * STRIDE);
            first = sum_over_lanes<1, half, STRIDE>(p, index);
        }
    }
    return first;
}

// Sums over the warp's channels: v[0..3] for dB and v[4..7] for dC, of four states. A lane ends with the first kSums of v.
template <int LANES, int G>
struct ChannelSums {
    static constexpr int kSums = LANES < 8 ? 8 / LANES : 1;

    static __device__ __forceinline__ void sum(float (&v)[8], int index) {
        if constexpr (LANES >= 8) {
            // Lanes hold their states in the order s ^ (index % 4). A lane keeps its registers 0 and 1 and gives 2 and 3, which
            // are the other's 0 and 1; then it keeps 0 and gives 1: the same registers in every lane.
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                v[i] += __shfl_xor_sync(kAll, v[i + 2], 2 * G);
                v[i + 1] += __shfl_xor_sync(kAll, v[i + 3], 2 * G);
                v[i] += __shfl_xor_sync(kAll, v[i + 1], G);
            }
            const bool is_C = index & 4;
            const float keep = is_C ? v[4] : v[0], give = is_C ? v[0] : v[4];
            v[0] = keep + __shfl_xor_sync(kAll, give, 4 * G);
            if constexpr (LANES > 8) v[0] += __shfl_xor_sync(kAll, v[0], 8 * G);
        } else {
            sum_over_lanes<8, LANES, G>(v, index);
        }
    }
    // to row[state] and row[states + state], each by one lane
    static __device__ __forceinline__ void store(float* row, const float (&v)[kSums], int index, int states) {
        if constexpr (LANES >= 8) {
            if (LANES == 8 || index < 8) row[(index & 4 ? states : 0) + index % 4] = v[0];
        } else {
            int first = 0;  // as sum_over_lanes leaves them
#pragma unroll
            for (int half = LANES / 2, width = 4; half > 0; half /= 2, width /= 2) first += index & half ? width : 0;
#pragma unroll
            for (int i = 0; i < kSums; i++) row[(first + i) / 4 * states + (first + i) % 4] = v[i];
        }
    }
};

// Where a thread stands in the recurrence: lane = group * G + g, with S states from g * S of K channels.
// A lane holds its channels in an order of its own, k ^ (g % K): see sum_over_states.
template <int G, int K_, int WARPS>
struct Place {
    static constexpr int K = K_;
    static constexpr int kThreads = 32 * WARPS;
    static constexpr int kStates = S * G;  // N, padded
    static constexpr int kGroups = 32 / G;
    static constexpr int kWarpChannels = kGroups * K;
    static constexpr int kChannels = WARPS * kWarpChannels;  // per block
    static_assert(K <= G && (K & (K - 1)) == 0, "every lane of a group has a first channel of its own");

    int g, group, warp, lane;
    int first;      // the warp's first channel
    int slots[K];   // the channels within the warp
    __device__ Place() {
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        g = lane % G, group = lane / G;
        first = blockIdx.x * kChannels + warp * kWarpChannels;
#pragma unroll
        for (int k = 0; k < K; k++) slots[k] = group * K + (k ^ (g % K));
    }
    __device__ __forceinline__ int channel(int k) const { return first + slots[k]; }
};

// Sums over the G lanes of each of K channels, held in the order k ^ (g % K), so that halving needs no choice of registers.
// First the lanes that hold different channels: afterwards v[0] is this lane's part of its own channel, slots[0].
template <int K>
__device__ __forceinline__ void sum_over_orders(float (&v)[K]) {
#pragma unroll
    for (int half = K / 2; half > 0; half /= 2) {
#pragma unroll
        for (int k = 0; k < half; k++) v[k] += __shfl_xor_sync(kAll, v[k + half], half);
    }
}
template <int G, int K>
__device__ __forceinline__ void sum_over_states(float (&v)[K]) {
    sum_over_orders(v);
#pragma unroll
    for (int lanes = K; lanes < G; lanes *= 2) v[0] += __shfl_xor_sync(kAll, v[0], lanes);
}
// Two at once: a lane with g < G / 2 ends with the sum of a, the others with that of b.
template <int G, int K>
__device__ __forceinline__ float sum_both_over_states(float (&a)[K], float (&b)[K], int g) {
    static_assert(K < G, "there are two lanes for each channel");
    sum_over_orders(a), sum_over_orders(b);
    const bool second = g & G / 2;
    const float keep = second ? b[0] : a[0], give = second ? a[0] : b[0];
    float sum = keep + __shfl_xor_sync(kAll, give, G / 2);
#pragma unroll
    for (int lanes = K; lanes < G / 2; lanes *= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
    return sum;
}

// A row of N floats at p to S registers from state g * S on; zero beyond N and for a channel that is not there.
__device__ __forceinline__ void load_states(float (&h)[S], const float* p, int g, int state_size, bool there) {
    const bool held = there && g * S < state_size;
    const float4 four = held ? *reinterpret_cast<const float4*>(p + g * S) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    h[0] = four.x, h[1] = four.y, h[2] = four.z, h[3] = four.w;
}

__device__ __forceinline__ void store_states(float* p, const float (&h)[S], int g, int state_size, bool there) {
    if (there && g * S < state_size) *reinterpret_cast<float4*>(p + g * S) = make_float4(h[0], h[1], h[2], h[3]);
}

__device__ __forceinline__ void read_states(float (&v)[S], const float* row, int g) {
    const float4 four = *reinterpret_cast<const float4*>(row + g * S);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}

template <typename T>
constexpr bool kExact = sizeof(T) == 4;

// Element s of h moves to s ^ by, 0 <= by < 4. Doing it twice undoes it.
__device__ __forceinline__ void permute(float (&h)[4], int by) {
    const float a = by & 1 ? h[1] : h[0], b = by & 1 ? h[0] : h[1], c = by & 1 ? h[3] : h[2], d = by & 1 ? h[2] : h[3];
    h[0] = by & 2 ? c : a, h[1] = by & 2 ? d : b, h[2] = by & 2 ? a : c, h[3] = by & 2 ? b : d;
}

template <typename T>
struct alignas(4 * sizeof(T)) Four {
    T v[4];
    __device__ __forceinline__ float operator[](int i) const { return to_float(v[i]); }
};

// One tile of a tensor with rows of channels (or states), four columns to each of THREADS threads (a warp or the block; `me` is
// the place among them), which keep to them. Fetched into
// registers one tile ahead. Rows beyond the last one repeat it, and columns beyond the last repeat the last four, so that
// every load is legal without a test; whoever uses the values makes them count for nothing.
template <typename T, int STEPS, int COLUMNS, int THREADS>
struct Tile {
    static constexpr int kGroups = COLUMNS / 4;       // threads along a row
    static constexpr int kRows = THREADS / kGroups;   // rows at a time
    static constexpr int kEach = kRows < STEPS ? STEPS / kRows : 1;
    static_assert(kRows * kEach % STEPS == 0 && THREADS % kGroups == 0, "a tile is whole rows of threads");
    Four<T> held[kEach];

    static __device__ __forceinline__ int me() { return threadIdx.x % THREADS; }
    static __device__ __forceinline__ int column() { return me() % kGroups * 4; }
    static __device__ __forceinline__ int step(int k) {
        return kRows <= STEPS ? me() / kGroups + k * kRows : me() / kGroups % STEPS;
    }
    // where there are more threads than places, a place has several threads: its copies 0, 1, ...
    static __device__ __forceinline__ int copy() { return me() / (kGroups * STEPS); }
    static __device__ __forceinline__ bool covers() { return kRows <= STEPS || copy() == 0; }

    // at: this thread's columns of the tile's first row; left: rows from there to the end, at least one
    __device__ __forceinline__ void fetch(const char* at, int row, int left) {
#pragma unroll
        for (int k = 0; k < kEach; k++)
            held[k] = *reinterpret_cast<const Four<T>*>(at + int64_t(min(step(k), left - 1)) * row);
    }

    __device__ __forceinline__ void put(float* shared, bool there) const {
#pragma unroll
        for (int k = 0; k < kEach; k++) {
            const Four<T>& x = held[k];
            if (covers())
                reinterpret_cast<float4*>(shared)[me() + k * THREADS] =
                    there ? make_float4(x[0], x[1], x[2], x[3]) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }

    // Four copies of each row, one after the other, copy c with its states in the order s ^ c (see `permute`).
    __device__ __forceinline__ void put_permuted(float* shared, bool there) const {
        static_assert(kRows >= STEPS, "a thread for each place, or several");
#pragma unroll
        for (int first = 0; first < 4; first += kRows / STEPS) {
            const int order = first + copy();
            float x[4] = {held[0][0], held[0][1], held[0][2], held[0][3]};
            permute(x, order);
            if (order < 4)
                *reinterpret_cast<float4*>(shared + (step(0) * 4 + order) * COLUMNS + column()) =
                    there ? make_float4(x[0], x[1], x[2], x[3]) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }
};

// The same for a warp, waiting in shared memory; a lane reads what it has copied itself.
template <typename T, int STEPS, int COLUMNS>
struct WarpTile : Tile<T, STEPS, COLUMNS, 32> {
    using Places = Tile<T, STEPS, COLUMNS, 32>;
    static constexpr int kSize = STEPS * COLUMNS;

    static __device__ __forceinline__ void fetch(T* shared, const char* at, int row, int left) {
        if (!Places::covers()) return;
#pragma unroll
        for (int k = 0; k < Places::kEach; k++)
            copy_async<sizeof(Four<T>)>(shared + 4 * (Places::me() + k * 32), at + int64_t(min(Places::step(k), left - 1)) * row);
    }
    static __device__ __forceinline__ Four<T> read(const T* shared, int k) {
        return *reinterpret_cast<const Four<T>*>(shared + 4 * (Places::covers() ? Places::me() + k * 32 : 0));
    }
};

// Where a warp's channel c lies in row t of (steps, CHANNELS) in shared memory, so that lanes which write four neighbours of 8
// or 16 bytes each, 16 bytes at a time, use all banks. `odd`: of t.
template <int CHANNELS>
struct Turned {
    static __device__ __forceinline__ int two(int c, int odd) {
        return CHANNELS == 16 ? c ^ odd << 1 : CHANNELS == 32 ? c ^ (c >> 4 & 1) << 1 : c;
    }
    static __device__ __forceinline__ int four(int c, int odd) { return CHANNELS == 16 ? c ^ (c >> 3 & 1) ^ odd << 1 : c; }
};

template <typename T>
__device__ __forceinline__ const char* corner_of(const void* base, int64_t batch, int image, int column, int columns) {
    return reinterpret_cast<const char*>(static_cast<const T*>(base) + image * batch + min(column, columns - 4));
}

// delta after bias and softplus
template <bool EXACT>
__device__ __forceinline__ float step_size(float raw, float bias, bool softplus) {
    const float x = raw + bias;
    return softplus ? softplus_of<EXACT>(x, exp_minus_abs<EXACT>(x)) : x;
}

// x, or 0 where `kept` is false: without a branch around what x is computed from
__device__ __forceinline__ float only(bool kept, float x) { return __uint_as_float(__float_as_uint(x) & (kept ? ~0u : 0u)); }

// four channels' values of a vector that may be absent
__device__ __forceinline__ Four<float> four_of(const float* p, int channel) {
    return p ? *reinterpret_cast<const Four<float>*>(p + channel) : Four<float>{};
}

// First pass: what a chunk hands on when nothing comes in.
//   forward:  h = exp(delta A) h + delta u B           of chunks 0 .. chunks - 2, in order
//   REVERSE:  h = exp(delta A) (h + dy C)              of chunks 1 .. chunks - 1, from last step to first
template <typename T, int G, int K, bool REVERSE, bool SOFTPLUS, bool GATED>
__global__ void __launch_bounds__(32 * kForwardWarps, kForwardBlocks) scan_summary(ScanParams p) {
    using P = Place<G, K, kForwardWarps>;
    constexpr int threads = P::kThreads, channels = P::kWarpChannels, states = P::kStates, tile_steps = kTile<T>;
    constexpr bool exact = kExact<T>;
    after_launch_before();
    MFUSER_SHARED(shared);
    const P at;
    // (warps, tile_steps, channels): delta and delta u (or dy)
    float2* const steps = reinterpret_cast<float2*>(shared) + at.warp * tile_steps * channels;
    float* rows = reinterpret_cast<float*>(reinterpret_cast<float2*>(shared) + kForwardWarps * tile_steps * channels);
    float* other_rows = rows + tile_steps * states;  // two of (tile_steps, states): B (or C)
    using Values = WarpTile<T, tile_steps, channels>;
    constexpr int tensors = GATED ? 3 : 2;
    using InRow = Turned<channels>;
    const int column = Values::column(), odd = Values::step(0) % 2;  // a thread's rows are all odd or all even
    // (warps, tensors, tile_steps, channels): the next delta, u (or dy) and z
    T* const raw = reinterpret_cast<T*>(other_rows + tile_steps * states) + at.warp * tensors * Values::kSize;

    const int chunk = blockIdx.y + (REVERSE ? 1 : 0), image = blockIdx.z;
    const int begin = chunk * p.chunk, stop = min(begin + p.chunk, p.length);

    float a[K][S], h[K][S], total[4] = {};  // total: of the four channels that this lane stages, over its steps
#pragma unroll
    for (int k = 0; k < K; k++) {
        load_states(a[k], p.A + int64_t(at.channel(k)) * p.state_size, at.g, p.state_size, at.channel(k) < p.dim);
#pragma unroll
        for (int s = 0; s < S; s++) a[k][s] *= kLog2e, h[k][s] = 0.0f;
    }

    using Rows = Tile<T, tile_steps, states, threads>;
    const int mine = min(at.first + Values::column(), p.dim - 4);  // the first staged channel
    const Four<float> bias = four_of(p.bias, mine);
    const char* const delta = corner_of<T>(p.delta, p.delta_batch, image, mine, p.dim);
    const char* const source = REVERSE ? corner_of<T>(p.dy, p.dy_batch, image, mine, p.dim)
                                       : corner_of<T>(p.u, p.u_batch, image, mine, p.dim);
    const char* const gate = GATED ? corner_of<T>(p.z, p.z_batch, image, mine, p.dim) : nullptr;
    const char* const vector = REVERSE ? corner_of<T>(p.C, p.C_batch, image, Rows::column(), p.state_size)
                                       : corner_of<T>(p.B, p.B_batch, image, Rows::column(), p.state_size);
    const int source_row = REVERSE ? p.dy_row : p.u_row, vector_row = REVERSE ? p.C_row : p.B_row;

    Rows raw_rows;
    const int tiles = (stop - begin + tile_steps - 1) / tile_steps;
    auto fetch = [&](int tile) {
        const int64_t first = begin + tile * tile_steps;
        const int left = stop - int(first);
        Values::fetch(raw, delta + first * p.delta_row, p.delta_row, left);
        Values::fetch(raw + Values::kSize, source + first * source_row, source_row, left);
        if (GATED) Values::fetch(raw + 2 * Values::kSize, gate + first * p.z_row, p.z_row, left);
        raw_rows.fetch(vector + first * vector_row, vector_row, left);
    };
    fetch(REVERSE ? tiles - 1 : 0);
    for (int i = 0; i < tiles; i++) {
        const int tile = REVERSE ? tiles - 1 - i : i, left = stop - (begin + tile * tile_steps);
        copies_done();
        __syncwarp();  // the warp has read the steps of the tile before
#pragma unroll
        for (int k = 0; k < Values::kEach; k++) {
            const bool counts = Values::step(k) < left;  // a step beyond the end changes nothing
            const Four<T> delta4 = Values::read(raw, k), source4 = Values::read(raw + Values::kSize, k);
            const Four<T> gate4 = Values::read(raw + (GATED ? 2 : 0) * Values::kSize, k);
            float d[4], v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                d[i] = only(counts, step_size<exact>(delta4[i], bias[i], SOFTPLUS));
                v[i] = only(!REVERSE || counts, source4[i]);
                if (GATED) v[i] *= gate4[i] * sigmoid<exact>(gate4[i]);
                if (!REVERSE) v[i] *= d[i];
                total[i] += Values::covers() ? d[i] : 0.0f;
            }
            if (Values::covers()) {
                float2* const row = steps + Values::step(k) * channels;
                *reinterpret_cast<float4*>(row + InRow::two(column, odd)) = make_float4(d[0], v[0], d[1], v[1]);
                *reinterpret_cast<float4*>(row + InRow::two(column + 2, odd)) = make_float4(d[2], v[2], d[3], v[3]);
            }
        }
        raw_rows.put(rows, Rows::column() < p.state_size);
        __syncthreads();
        if (i + 1 < tiles) fetch(REVERSE ? tile - 1 : tile + 1);
        const float2* now_at[2][K];  // of even and odd steps
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int odd = 0; odd < 2; odd++) now_at[odd][k] = steps + InRow::two(at.slots[k], odd);
        }
#pragma unroll 8
        for (int j = 0; j < tile_steps; j++) {
            const int t = REVERSE ? tile_steps - 1 - j : j;
            float v[S];
            read_states(v, rows + t * states, at.g);
#pragma unroll
            for (int k = 0; k < K; k++) {
                const float2 now = now_at[t % 2][k][t * channels];
#pragma unroll
                for (int s = 0; s < S; s++) {
                    const float decay = k * S + s < (exact ? 0 : kByHand) ? exp2_by_hand(now.x * a[k][s]) : exp2_fast(now.x * a[k][s]);
                    h[k][s] = REVERSE ? decay * fmaf(now.y, v[s], h[k][s]) : fmaf(decay, h[k][s], now.y * v[s]);
                }
            }
        }
        float* const read = rows;
        rows = other_rows, other_rows = read;  // who is ahead writes what all have read before the last barrier
    }
    next_may_start();  // not before: blocks of the next kernel would fill some multiprocessors and leave others idle
    const int64_t row = (int64_t(image) * p.chunks + chunk) * p.dim;
#pragma unroll
    for (int k = 0; k < K; k++) {
        store_states(p.end + (row + at.channel(k)) * p.state_size, h[k], at.g, p.state_size, at.channel(k) < p.dim);
    }
#pragma unroll
    for (int lanes = Values::kGroups; lanes < 32; lanes *= 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) total[i] += __shfl_xor_sync(kAll, total[i], lanes);
    }
    if (at.lane < Values::kGroups && at.first + column < p.dim)
        *reinterpret_cast<float4*>(p.total + row + at.first + column) = make_float4(total[0], total[1], total[2], total[3]);
}

// Folds the summaries of chunks from, from + by, ... before `to` into h, which starts as what comes in from outside.
template <typename P>
__device__ __forceinline__ void fold(float (&h)[P::K][S], const float (&a)[P::K][S], const ScanParams& p, int image, int from,
                                     int to, int by, const P& at) {
#pragma unroll 8
    for (int j = from; j != to; j += by) {
#pragma unroll
        for (int k = 0; k < P::K; k++) {
            const bool there = at.channel(k) < p.dim;
            const int64_t row = (int64_t(image) * p.chunks + j) * p.dim + at.channel(k);
            float end[S];
            load_states(end, p.end + row * p.state_size, at.g, p.state_size, there);
            const float total = there ? p.total[row] : 0.0f;
#pragma unroll
            for (int s = 0; s < S; s++) h[k][s] = fmaf(exp2_fast(total * a[k][s]), h[k][s], end[s]);
        }
    }
}

template <typename T, int G, int K, bool SOFTPLUS, bool GATED>
__global__ void __launch_bounds__(32 * kForwardWarps, kForwardBlocks) scan_forward(ScanParams p) {
    using P = Place<G, K, kForwardWarps>;
    constexpr int threads = P::kThreads, channels = P::kWarpChannels, states = P::kStates, tile_steps = kTile<T>;
    static_assert(tile_steps % kSub == 0, "states are kept between tiles");
    MFUSER_SHARED(shared);
    const P at;
    // (warps, tile_steps, channels): delta, delta u
    float2* const steps = reinterpret_cast<float2*>(shared) + at.warp * tile_steps * channels;
    float* rows = reinterpret_cast<float*>(reinterpret_cast<float2*>(shared) + kForwardWarps * tile_steps * channels);
    float* other_rows = rows + 2 * tile_steps * states;  // two of (2, tile_steps, states): B and C
    using Values = WarpTile<T, tile_steps, channels>;
    using InRow = Turned<channels>;
    const int column = Values::column(), odd = Values::step(0) % 2;  // a thread's rows are all odd or all even
    // (warps, tile_steps, channels)
    float* const y_rows = other_rows + 2 * tile_steps * states + at.warp * tile_steps * channels;
    // (warps, tensors, tile_steps, channels): the next delta, u of two tiles, and z
    constexpr int tensors = GATED ? 4 : 3;
    T* const raw =
        reinterpret_cast<T*>(other_rows + (2 * states + P::kChannels) * tile_steps) + at.warp * tensors * Values::kSize;
    T *raw_u = raw + Values::kSize, *other_u = raw + 2 * Values::kSize;
    T* const raw_z = raw + (GATED ? 3 : 0) * Values::kSize;

    const int chunk = blockIdx.y, image = blockIdx.z;
    const int begin = chunk * p.chunk, stop = min(begin + p.chunk, p.length);
    const int64_t corner = int64_t(image) * p.dim;

    float a[K][S], h[K][S];
#pragma unroll
    for (int k = 0; k < K; k++) {
        const bool there = at.channel(k) < p.dim;
        load_states(a[k], p.A + int64_t(at.channel(k)) * p.state_size, at.g, p.state_size, there);
#pragma unroll
        for (int s = 0; s < S; s++) a[k][s] *= kLog2e, h[k][s] = 0.0f;
        if (p.initial) load_states(h[k], p.initial + (corner + at.channel(k)) * p.state_size, at.g, p.state_size, there);
    }

    constexpr bool exact = kExact<T>;
    using Rows = Tile<T, tile_steps, states, threads>;
    const bool staged = at.first + Values::column() < p.dim;
    const int mine = min(at.first + Values::column(), p.dim - 4);
    const Four<float> bias = four_of(p.bias, mine), skip = four_of(p.D, mine);
    const char* const delta = corner_of<T>(p.delta, p.delta_batch, image, mine, p.dim);
    const char* const u = corner_of<T>(p.u, p.u_batch, image, mine, p.dim);
    const char* const z = GATED ? corner_of<T>(p.z, p.z_batch, image, mine, p.dim) : nullptr;
    const char* const B = corner_of<T>(p.B, p.B_batch, image, Rows::column(), p.state_size);
    const char* const C = corner_of<T>(p.C, p.C_batch, image, Rows::column(), p.state_size);
    const bool padded = Rows::column() >= p.state_size;
    T* const result = static_cast<T*>(p.y) + int64_t(image) * p.length * p.dim + mine;
    const int kept = (p.length + kSub - 1) / kSub;

    Rows raw_B, raw_C;
    auto fetch = [&](int64_t first, T* to_u) {
        const int left = stop - int(first);
        Values::fetch(raw, delta + first * p.delta_row, p.delta_row, left);
        Values::fetch(to_u, u + first * p.u_row, p.u_row, left);
        raw_B.fetch(B + first * p.B_row, p.B_row, left);
        raw_C.fetch(C + first * p.C_row, p.C_row, left);
    };
    fetch(begin, raw_u);
    after_launch_before();
    fold(h, a, p, image, 0, chunk, 1, at);
    for (int first = begin; first < stop; first += tile_steps) {
        copies_done();
#pragma unroll
        for (int k = 0; k < Values::kEach; k++) {
            const bool counts = Values::step(k) < stop - first;  // a step beyond the end changes nothing
            const Four<T> delta4 = Values::read(raw, k), u4 = Values::read(raw_u, k);
            float d[4], v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                d[i] = only(counts, step_size<exact>(delta4[i], bias[i], SOFTPLUS));
                v[i] = d[i] * u4[i];
            }
            if (Values::covers()) {
                float2* const row = steps + Values::step(k) * channels;
                *reinterpret_cast<float4*>(row + InRow::two(column, odd)) = make_float4(d[0], v[0], d[1], v[1]);
                *reinterpret_cast<float4*>(row + InRow::two(column + 2, odd)) = make_float4(d[2], v[2], d[3], v[3]);
            }
        }
        raw_B.put(rows, !padded);
        raw_C.put(rows + tile_steps * states, !padded);
        __syncthreads();
        if (GATED) Values::fetch(raw_z, z + int64_t(first) * p.z_row, p.z_row, stop - first);
        if (first + tile_steps < stop) fetch(first + tile_steps, other_u);
#pragma unroll 1
        for (int t0 = 0; t0 < tile_steps && first + t0 < stop; t0 += kSub) {
            if (p.saved) {
                const int64_t row = (int64_t(image) * kept + (first + t0) / kSub) * p.dim;
#pragma unroll
                for (int k = 0; k < K; k++)
                    store_states(p.saved + (row + at.channel(k)) * p.state_size, h[k], at.g, p.state_size,
                                 at.channel(k) < p.dim);
            }
            // Kept in registers until the steps have been read: a store among them would hold up the loads behind it.
            // A lane of G takes one of G / K steps of its own channel, or one of K channels.
            constexpr int together = K < G ? G / K : 1;
            float y[kSub / together];
            const float2* now_at[2][K];  // of even and odd steps
#pragma unroll
            for (int k = 0; k < K; k++) {
#pragma unroll
                for (int odd = 0; odd < 2; odd++) now_at[odd][k] = steps + t0 * channels + InRow::two(at.slots[k], odd);
            }
            const float* const b_at = rows + t0 * states;
            const float* const c_at = b_at + tile_steps * states;
#pragma unroll
            for (int t1 = 0; t1 < kSub; t1 += together) {
                float sums[together][K];
#pragma unroll
                for (int j = 0; j < together; j++) {
                    const int t = t1 + j;
                    float b[S], c[S];
                    read_states(b, b_at + t * states, at.g);
                    read_states(c, c_at + t * states, at.g);
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        const float2 now = now_at[t % 2][k][t * channels];
#pragma unroll
                        for (int s = 0; s < S; s++) {
                            h[k][s] = fmaf(exp2_fast(now.x * a[k][s]), h[k][s], now.y * b[s]);
                            sums[j][k] = s ? fmaf(h[k][s], c[s], sums[j][k]) : h[k][s] * c[s];
                        }
                    }
                    sum_over_orders(sums[j]);
                }
                float own[together];
#pragma unroll
                for (int j = 0; j < together; j++) own[j] = sums[j][0];
                sum_over_lanes<together, G / K, K>(own, at.g / K);
                y[t1 / together] = own[0];
            }
#pragma unroll
            for (int i = 0; i < kSub / together; i++)
                y_rows[(t0 + i * together + at.g / K) * channels + at.slots[0]] = y[i];
        }
        if (GATED) copies_done();
        __syncwarp();
        T* const out = result + int64_t(first) * p.dim;
#pragma unroll
        for (int k = 0; k < Values::kEach; k++) {
            if (!Values::covers() || !staged || Values::step(k) >= stop - first) continue;
            const Four<float> sums = reinterpret_cast<const Four<float>*>(y_rows)[at.lane + k * 32];
            const Four<T> u4 = Values::read(raw_u, k), z4 = Values::read(raw_z, k);
            Four<T> value;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float x = fmaf(skip[i], u4[i], sums[i]);
                if (GATED) x *= z4[i] * sigmoid<exact>(z4[i]);
                value.v[i] = from_float<T>(x);
            }
            *reinterpret_cast<Four<T>*>(out + int64_t(Values::step(k)) * p.dim) = value;
        }
        __syncwarp();
        T* const used = raw_u;
        raw_u = other_u, other_u = used;
        float* const read = rows;
        rows = other_rows, other_rows = read;  // who is ahead writes what all have read before the last barrier
    }
    if (stop != p.length) return;
#pragma unroll
    for (int k = 0; k < K; k++)
        store_states(p.state + (corner + at.channel(k)) * p.state_size, h[k], at.g, p.state_size, at.channel(k) < p.dim);
}

// Floats of shared memory that the backward's block needs, in order; `buffer` is there twice. Then the raw inputs of T.
template <typename T, int G, int K, bool GATED>
struct BackwardMemory {
    using P = Place<G, K, kBackwardWarps>;
    // With eight channels or more in a warp, lanes hold their four states in an order of their own, so that halving sums
    // over channels need not choose registers by lane: see ChannelSums.
    static constexpr bool kPermuted = P::kGroups >= 8;
    static constexpr int kCopies = kPermuted ? 4 : 1;
    static constexpr int kSteps = 4 * kSub * P::kChannels;                     // (warps, kSub, channels) of float4
    static constexpr int kRows = kSub * P::kStates * kCopies;                  // of B or C
    static constexpr int kSums = kBackwardWarps * kSub * 2 * P::kStates;       // dB and dC of each warp's channels
    static constexpr int kBuffer = 2 * kRows + kSums;
    static constexpr int kLongSums = 8 + S * K;                                // of each thread
    // (warps, kRaw, kSub, channels) of T: delta, u, dy, u, dy; with a gate delta, u, dy, z twice
    static constexpr int kRaw = GATED ? 8 : 5;
    static constexpr size_t kBytes = (kSteps + 2 * kBuffer) * sizeof(float) + kLongSums * P::kThreads * sizeof(LongSum) +
                                     kRaw * kSub * P::kChannels * sizeof(T);
};

template <typename T, int G, int K, bool SOFTPLUS, bool GATED>
__global__ void __launch_bounds__(32 * kBackwardWarps, kBackwardBlocks) scan_backward(ScanParams p) {
    using P = Place<G, K, kBackwardWarps>;
    using M = BackwardMemory<T, G, K, GATED>;
    using Sums = ChannelSums<P::kGroups, G>;
    using Values = WarpTile<T, kSub, P::kWarpChannels>;
    constexpr int threads = P::kThreads, channels = P::kWarpChannels, states = P::kStates, copies = M::kCopies;
    constexpr bool exact = kExact<T>;
    MFUSER_SHARED(shared);
    const P at;
    using InRow = Turned<channels>;
    const int column = Values::column(), odd = Values::step(0) % 2;  // a thread's rows are all odd or all even
    // delta, delta u, dy, softplus'; then delta, gB, dd, softplus' (or y, where there is a gate)
    float4* const steps = reinterpret_cast<float4*>(shared) + at.warp * kSub * channels;
    float* buffer = reinterpret_cast<float*>(shared) + M::kSteps;
    float* other_buffer = buffer + M::kBuffer;
    // dD and dbias of each thread's four channels, dA of its states; seldom touched, and registers are dear
    LongSum* const ends = reinterpret_cast<LongSum*>(reinterpret_cast<float*>(shared) + M::kSteps + 2 * M::kBuffer) + threadIdx.x;
    T* const raw = reinterpret_cast<T*>(ends - threadIdx.x + M::kLongSums * threads) + at.warp * M::kRaw * Values::kSize;
    T *raw_u = raw + Values::kSize, *other_u = raw + (GATED ? 5 : 3) * Values::kSize;  // dy lies behind, then z; with a gate
                                                                                       // delta before
#pragma unroll
    for (int i = 0; i < M::kLongSums; i++) ends[i * threads] = LongSum();

    const int chunk = blockIdx.y, image = blockIdx.z;
    const int begin = chunk * p.chunk, stop = min(begin + p.chunk, p.length);
    const int64_t corner = int64_t(image) * p.dim;

    float a[K][S], later[K][S], tile_dA[K][S] = {};  // later: exp(delta[t+1] A) g[t+1]
    const int order = M::kPermuted ? at.group % 4 : 0;  // register s holds state s ^ order
#pragma unroll
    for (int k = 0; k < K; k++) {
        const bool there = at.channel(k) < p.dim;
        load_states(a[k], p.A + int64_t(at.channel(k)) * p.state_size, at.g, p.state_size, there);
#pragma unroll
        for (int s = 0; s < S; s++) a[k][s] *= kLog2e, later[k][s] = 0.0f;
        if (p.dstate) load_states(later[k], p.dstate + (corner + at.channel(k)) * p.state_size, at.g, p.state_size, there);
    }

    using Rows = Tile<T, kSub, states, threads>;
    const bool staged = at.first + Values::column() < p.dim;
    const int mine = min(at.first + Values::column(), p.dim - 4);
    const Four<float> bias = four_of(p.bias, mine), skip = four_of(p.D, mine);
    const char* const delta = corner_of<T>(p.delta, p.delta_batch, image, mine, p.dim);
    const char* const u = corner_of<T>(p.u, p.u_batch, image, mine, p.dim);
    const char* const z = GATED ? corner_of<T>(p.z, p.z_batch, image, mine, p.dim) : nullptr;
    const char* const dy = corner_of<T>(p.dy, p.dy_batch, image, mine, p.dim);
    const char* const B = corner_of<T>(p.B, p.B_batch, image, Rows::column(), p.state_size);
    const char* const C = corner_of<T>(p.C, p.C_batch, image, Rows::column(), p.state_size);
    const bool padded = Rows::column() >= p.state_size;
    const int64_t out = int64_t(image) * p.length * p.dim + mine;
    const int kept = (p.length + kSub - 1) / kSub;

    Rows raw_B, raw_C;
    float next_start[K][S];
    auto fetch = [&](int64_t first, T* to) {
        const int left = stop - int(first);
        Values::fetch(GATED ? to - Values::kSize : raw, delta + first * p.delta_row, p.delta_row, left);
        Values::fetch(to, u + first * p.u_row, p.u_row, left);
        Values::fetch(to + Values::kSize, dy + first * p.dy_row, p.dy_row, left);
        if (GATED) Values::fetch(to + 2 * Values::kSize, z + first * p.z_row, p.z_row, left);
        const int64_t row = (int64_t(image) * kept + first / kSub) * p.dim;
#pragma unroll
        for (int k = 0; k < K; k++)
            load_states(next_start[k], p.saved + (row + at.channel(k)) * p.state_size, at.g, p.state_size, at.channel(k) < p.dim);
        raw_B.fetch(B + first * p.B_row, p.B_row, left);
        raw_C.fetch(C + first * p.C_row, p.C_row, left);
    };
    // the sums over the block's channels of the tile from `first` on, once all warps have left theirs in `sums`
    auto add_up = [&](const float* sums, int first) {
        for (int i = threadIdx.x; i < kSub * 2 * states; i += threads) {
            const int t = first + i / (2 * states), n = i % states;
            if (t >= stop || n >= p.state_size) continue;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kBackwardWarps; w++) sum += sums[w * kSub * 2 * states + i];
            float* const part = i / states % 2 ? p.part_C : p.part_B;
            part[((int64_t(blockIdx.x) * p.batch + image) * p.length + t) * p.state_size + n] = sum;
        }
    };
    const int last = begin + (stop - begin - 1) / kSub * kSub;
    fetch(last, raw_u);
    after_launch_before();
    fold(later, a, p, image, p.chunks - 1, chunk, -1, at);
#pragma unroll
    for (int k = 0; k < K; k++) permute(a[k], order), permute(later[k], order);
    for (int first = last; first >= begin; first -= kSub) {
        float* const B_rows = buffer;
        float* const C_rows = B_rows + M::kRows;
        float* const sums = C_rows + M::kRows;
        const T* const raw_delta = GATED ? raw_u - Values::kSize : raw;
        const T* const raw_dy = raw_u + Values::kSize;
        const T* const raw_z = raw_u + (GATED ? 2 : 0) * Values::kSize;
        copies_done();
#pragma unroll
        for (int k = 0; k < Values::kEach; k++) {
            // a step beyond the end, or a channel: no decay, no inflow, no gradient
            const bool counts = staged && Values::step(k) < stop - first;
            const Four<T> delta4 = Values::read(raw_delta, k), u4 = Values::read(raw_u, k), dy4 = Values::read(raw_dy, k);
            const Four<T> z4 = Values::read(raw_z, k);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float x = delta4[i] + bias[i];
                float d = x, slope = 1.0f;
                if (SOFTPLUS) {
                    const float e = exp_minus_abs<exact>(x);
                    d = softplus_of<exact>(x, e), slope = GATED ? 0.0f : sigmoid_of(x, e);
                }
                d = only(counts, d);
                float g = only(counts, dy4[i]);
                if (GATED) g *= z4[i] * sigmoid<exact>(z4[i]);
                if (Values::covers())
                    steps[Values::step(k) * channels + InRow::four(column + i, odd)] = make_float4(d, d * u4[i], g, slope);
            }
        }
        if constexpr (M::kPermuted) {
            raw_B.put_permuted(B_rows, !padded);
            raw_C.put_permuted(C_rows, !padded);
        } else {
            raw_B.put(B_rows, !padded);
            raw_C.put(C_rows, !padded);
        }
        float start[K][S];
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int s = 0; s < S; s++) start[k][s] = next_start[k][s];
            permute(start[k], order);
        }
        __syncthreads();
        if (first < last) add_up(other_buffer + 2 * M::kRows, first + kSub);
        if (first > begin) fetch(first - kSub, other_u);

        const float4* now_at[2][K];  // of even and odd steps
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int odd = 0; odd < 2; odd++) now_at[odd][k] = steps + InRow::four(at.slots[k], odd);
        }
        const float* const b_at = B_rows + order * states;
        const float* const c_at = C_rows + order * states;
        auto advance = [&](float (&to)[K][S], const float (&from)[K][S], int t0, int t) {
            float b[S];
            read_states(b, b_at + t0 * copies * states + t * copies * states, at.g);
#pragma unroll
            for (int k = 0; k < K; k++) {
                const float2 now = *reinterpret_cast<const float2*>(now_at[t % 2][k] + t0 * channels + t * channels);
#pragma unroll
                for (int s = 0; s < S; s++) to[k][s] = fmaf(exp2_fast(now.x * a[k][s]), from[k][s], now.y * b[s]);
            }
        };
#pragma unroll 1
        for (int t0 = kSub - kHold; t0 >= 0; t0 -= kHold) {
            // forward again: h[i] is the state before step t0 + i
            float h[kHold + 1][K][S];
#pragma unroll
            for (int k = 0; k < K; k++) {
#pragma unroll
                for (int s = 0; s < S; s++) h[0][k][s] = start[k][s];
            }
#pragma unroll 4
            for (int t = 0; t < kHold; t++) {
                if (t0 > 0) advance(h[0], h[0], 0, t);
            }
#pragma unroll
            for (int i = 0; i < kHold; i++) advance(h[i + 1], h[i], t0, i);
#pragma unroll
            for (int i0 = kHold - kLinger; i0 >= 0; i0 -= kLinger) {
                // results wait in registers: a store among the steps would hold up the loads behind it
                float over[kLinger][Sums::kSums], both_sums[kLinger], ys[GATED ? kLinger : 1];
#pragma unroll
                for (int j = kLinger - 1; j >= 0; j--) {
                    const int i = i0 + j;
                    float b[S], c[S], both[2 * S] = {}, gB[K], dd[K], y[K];
                    read_states(b, b_at + t0 * copies * states + i * copies * states, at.g);
                    read_states(c, c_at + t0 * copies * states + i * copies * states, at.g);
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        const float4 now = now_at[i % 2][k][t0 * channels + i * channels];
                        gB[k] = dd[k] = y[k] = 0.0f;
#pragma unroll
                        for (int s = 0; s < S; s++) {
                            const float g = fmaf(now.z, c[s], later[k][s]);
                            both[s] = fmaf(g, now.y, both[s]);                       // dB
                            both[S + s] = fmaf(now.z, h[i + 1][k][s], both[S + s]);  // dC
                            gB[k] = fmaf(g, b[s], gB[k]);
                            later[k][s] = exp2_fast(now.x * a[k][s]) * g;
                            const float carried = later[k][s] * h[i][k][s];
                            tile_dA[k][s] = fmaf(carried, now.x, tile_dA[k][s]);
                            dd[k] = fmaf(carried, a[k][s], dd[k]);
                            if (GATED) y[k] = fmaf(h[i + 1][k][s], c[s], y[k]);
                        }
                    }
                    Sums::sum(both, at.group);
#pragma unroll
                    for (int n = 0; n < Sums::kSums; n++) over[j][n] = both[n];
                    both_sums[j] = sum_both_over_states<G>(gB, dd, at.g);
                    if constexpr (GATED) {
                        sum_over_states<G>(y);
                        ys[j] = y[0];
                    }
                }
                __syncwarp();  // results take the place of what other lanes have read
#pragma unroll
                for (int j = 0; j < kLinger; j++) {
                    const int t = t0 + i0 + j, odd = (i0 + j) % 2;
                    Sums::store(sums + (at.warp * kSub + t) * 2 * states + at.g * S, over[j], at.group, states);
                    float* const done = reinterpret_cast<float*>(const_cast<float4*>(now_at[odd][0]) + t * channels);
                    if (at.g % (G / 2) < K) done[at.g < G / 2 ? 1 : 2] = both_sums[j];
                    if (GATED && at.g < K) done[3] = ys[GATED ? j : 0];
                }
            }
        }
        if (first == begin || (first - begin) / kSub % 8 == 0) {
#pragma unroll
            for (int k = 0; k < K; k++) {
#pragma unroll
                for (int s = 0; s < S; s++) {
                    ends[(8 + k * S + s) * threads].add(tile_dA[k][s]);
                    tile_dA[k][s] = 0.0f;
                }
            }
        }
        __syncwarp();

        float tile_dD[4] = {}, tile_dbias[4] = {};
        const int64_t tile = out + int64_t(first) * p.dim;
#pragma unroll
        for (int k = 0; k < Values::kEach; k++) {
            if (!Values::covers() || !staged || Values::step(k) >= stop - first) continue;
            const int64_t place = tile + int64_t(Values::step(k)) * p.dim;
            const Four<T> delta4 = Values::read(raw_delta, k), u4 = Values::read(raw_u, k), dy4 = Values::read(raw_dy, k);
            const Four<T> z4 = Values::read(raw_z, k);
            Four<T> du, ddelta, dz;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4 now = steps[Values::step(k) * channels + InRow::four(column + i, odd)];
                const float x = u4[i];
                float g = dy4[i];
                if (GATED) {
                    const float gate = z4[i], share = sigmoid<exact>(gate);
                    dz.v[i] = from_float<T>(g * fmaf(skip[i], x, now.w) * share * fmaf(gate, 1.0f - share, 1.0f));
                    g *= gate * share;
                }
                float dstep = fmaf(now.y, x, now.z * kLn2);  // a is A in units of log 2
                if (SOFTPLUS) dstep *= GATED ? sigmoid<exact>(delta4[i] + bias[i]) : now.w;
                du.v[i] = from_float<T>(fmaf(now.y, now.x, skip[i] * g));
                ddelta.v[i] = from_float<T>(dstep);
                tile_dD[i] = fmaf(g, x, tile_dD[i]);
                tile_dbias[i] += dstep;
            }
            *reinterpret_cast<Four<T>*>(static_cast<T*>(p.du) + place) = du;
            *reinterpret_cast<Four<T>*>(static_cast<T*>(p.ddelta) + place) = ddelta;
            if (GATED) *reinterpret_cast<Four<T>*>(static_cast<T*>(p.dz) + place) = dz;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            ends[i * threads].add(tile_dD[i]);
            ends[(4 + i) * threads].add(tile_dbias[i]);
        }
        __syncwarp();
        T* const used = raw_u;
        raw_u = other_u, other_u = used;
        buffer = other_buffer, other_buffer = B_rows;  // who is ahead writes what all have read before the last barrier
    }
    __syncthreads();
    add_up(other_buffer + 2 * M::kRows, begin);

    const int64_t place = (int64_t(image) * p.chunks + chunk) * p.dim;
#pragma unroll
    for (int k = 0; k < K; k++) {
        const bool there = at.channel(k) < p.dim;
        float dA[S];
#pragma unroll
        for (int s = 0; s < S; s++) dA[s] = ends[(8 + k * S + s) * threads].sum;
        permute(dA, order), permute(later[k], order);
        store_states(p.part_A + (place + at.channel(k)) * p.state_size, dA, at.g, p.state_size, there);
        if (chunk == 0 && p.dinitial)
            store_states(p.dinitial + (corner + at.channel(k)) * p.state_size, later[k], at.g, p.state_size, there);
    }

    // the sums of all lanes that staged a channel
    __syncwarp();
    for (int c = at.lane; c < channels; c += 32) {
        const LongSum* const of_warp = ends - at.lane;
        float sum_D = 0.0f, sum_bias = 0.0f;
        for (int t = c / 4; t < 32; t += Values::kGroups) {
            sum_D += of_warp[c % 4 * threads + t].sum;
            sum_bias += of_warp[(4 + c % 4) * threads + t].sum;
        }
        if (at.first + c < p.dim) {
            p.part_D[place + at.first + c] = sum_D;
            p.part_bias[place + at.first + c] = sum_bias;
        }
    }
}

// Adds up the parts, each sum by one thread and in order: dB, dC over channel blocks; dA, dD, dbias over images and chunks.
template <typename T>
__global__ void __launch_bounds__(256) scan_finish(ScanParams p, int blocks) {
    after_launch_before();
    const int64_t tokens = int64_t(p.batch) * p.length * p.state_size, weights = int64_t(p.dim) * p.state_size;
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    auto total = [](const float* part, int64_t apart, int count) {
        float sum = 0.0f;
        for (int k = 0; k < count; k++) sum += part[k * apart];
        return sum;
    };
    if (i < tokens) static_cast<T*>(p.dB)[i] = from_float<T>(total(p.part_B + i, tokens, blocks));
    else if (i < 2 * tokens) static_cast<T*>(p.dC)[i - tokens] = from_float<T>(total(p.part_C + i - tokens, tokens, blocks));
    else if (i < 2 * tokens + weights) p.dA[i - 2 * tokens] = total(p.part_A + i - 2 * tokens, weights, p.batch * p.chunks);
    else if (i < 2 * tokens + weights + 2 * p.dim) {
        const int64_t d = i - 2 * tokens - weights;
        const bool bias = d >= p.dim;
        const float sum = total((bias ? p.part_bias - p.dim : p.part_D) + d, p.dim, p.batch * p.chunks);
        (bias ? p.dbias - p.dim : p.dD)[d] = sum;
    }
}

template <int G, int K, int WARPS>
dim3 grid_of(const ScanParams& p, int chunks) {
    constexpr int channels = Place<G, K, WARPS>::kChannels;
    return dim3((p.dim + channels - 1) / channels, chunks, p.batch);
}

// of shared memory; `vectors`: B, or B and C; `tensors`: (tile_steps, channels) of T, `sums`: the same of float
template <typename T, int G, int K>
constexpr size_t forward_bytes(int vectors, int tensors, int sums) {
    using P = Place<G, K, kForwardWarps>;
    const size_t of_channel = sizeof(float2) + tensors * sizeof(T) + sums * sizeof(float);
    return kTile<T> * (P::kChannels * of_channel + 2 * vectors * P::kStates * sizeof(float));
}

template <typename T, int G, int K, bool SOFTPLUS, bool GATED>
cudaError_t forward(const ScanParams& p, void* stream) {
    constexpr int threads = 32 * kForwardWarps;
    if (p.chunks > 1) {
        const dim3 grid = grid_of<G, K, kForwardWarps>(p, p.chunks - 1);
        const cudaError_t error =
            MFUSER_LAUNCH_NEXT((scan_summary<T, G, K, false, SOFTPLUS, false>), grid, threads,
                               (forward_bytes<T, G, K>(1, 2, 0)), stream, p);
        if (error != cudaSuccess) return error;
    }
    const dim3 grid = grid_of<G, K, kForwardWarps>(p, p.chunks);
    constexpr size_t bytes = forward_bytes<T, G, K>(2, GATED ? 4 : 3, 1);
    if (p.chunks > 1) return MFUSER_LAUNCH_NEXT((scan_forward<T, G, K, SOFTPLUS, GATED>), grid, threads, bytes, stream, p);
    return MFUSER_LAUNCH((scan_forward<T, G, K, SOFTPLUS, GATED>), grid, threads, bytes, stream, p);
}

template <typename T, int G, int FORWARD_K, int K, bool SOFTPLUS, bool GATED>
cudaError_t backward(const ScanParams& p, void* stream) {
    constexpr int threads = 32 * kBackwardWarps;
    constexpr size_t first_bytes = forward_bytes<T, G, FORWARD_K>(1, GATED ? 3 : 2, 0);
    constexpr size_t bytes = BackwardMemory<T, G, K, GATED>::kBytes;
    const dim3 grid = grid_of<G, K, kBackwardWarps>(p, p.chunks);
    cudaError_t error;
    if (p.chunks > 1) {
        const dim3 first_grid = grid_of<G, FORWARD_K, kForwardWarps>(p, p.chunks - 1);
        error = MFUSER_LAUNCH_NEXT((scan_summary<T, G, FORWARD_K, true, SOFTPLUS, GATED>), first_grid, 32 * kForwardWarps,
                                   first_bytes, stream, p);
        if (error != cudaSuccess) return error;
        error = MFUSER_LAUNCH_NEXT((scan_backward<T, G, K, SOFTPLUS, GATED>), grid, threads, bytes, stream, p);
    } else {
        error = MFUSER_LAUNCH((scan_backward<T, G, K, SOFTPLUS, GATED>), grid, threads, bytes, stream, p);
    }
    if (error != cudaSuccess) return error;
    const int64_t all = 2 * int64_t(p.batch) * p.length * p.state_size + int64_t(p.dim) * (p.state_size + 2);
    return MFUSER_LAUNCH_NEXT((scan_finish<T>), dim3((all + 255) / 256), 256, 0, stream, p, int(grid.x));
}

// Lanes and channels by N: 8 and 16 states fit exactly, others are padded with zeros.
struct Two {
    static constexpr int G = 2, kForward = 2, kBackward = 1;
};
struct FourLanes {
    static constexpr int G = 4, kForward = 2, kBackward = 2;
};
struct Sixteen {
    static constexpr int G = 16, kForward = 4, kBackward = 2;
};

// a template argument for each switch
template <typename T, typename L>
cudaError_t forward_as(const ScanParams& p, void* stream) {
    constexpr int G = L::G, K = L::kForward;
    if (p.softplus) return p.z ? forward<T, G, K, true, true>(p, stream) : forward<T, G, K, true, false>(p, stream);
    return p.z ? forward<T, G, K, false, true>(p, stream) : forward<T, G, K, false, false>(p, stream);
}

template <typename T, typename L>
cudaError_t backward_as(const ScanParams& p, void* stream) {
    constexpr int G = L::G, F = L::kForward, K = L::kBackward;
    if (p.softplus) return p.z ? backward<T, G, F, K, true, true>(p, stream) : backward<T, G, F, K, true, false>(p, stream);
    return p.z ? backward<T, G, F, K, false, true>(p, stream) : backward<T, G, F, K, false, false>(p, stream);
}

inline bool well_formed(const ScanParams& p) {
    return p.sub == kSub && p.chunk % kSub == 0 && p.dim % 4 == 0 && p.state_size % 4 == 0 && p.state_size <= 64;
}

template <typename T>
cudaError_t forward_any(const ScanParams& p, void* stream) {
    if (!well_formed(p)) return cudaErrorInvalidValue;
    if (p.state_size <= 8) return forward_as<T, Two>(p, stream);
    if (p.state_size <= 16) return forward_as<T, FourLanes>(p, stream);
    return forward_as<T, Sixteen>(p, stream);
}

template <typename T>
cudaError_t backward_any(const ScanParams& p, void* stream) {
    if (!well_formed(p)) return cudaErrorInvalidValue;
    if (p.state_size <= 8) return backward_as<T, Two>(p, stream);
    if (p.state_size <= 16) return backward_as<T, FourLanes>(p, stream);
    return backward_as<T, Sixteen>(p, stream);
}

}  // namespace
