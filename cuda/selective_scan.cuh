// The selective scan (S6), forward and backward; mfuser/ops/selective_scan/reference.py has the equations.
//
// A channel's states lie in the registers of G neighbouring lanes, S = 4 in each, so that the recurrence is four
// independent fused multiply-adds a step. The sequence is cut into chunks that run side by side in two passes: the first gives what
// each chunk hands on when it starts from zero (`end`) and how long it lasts (`total`, the sum of delta: the decay over
// a chunk is exp(A total)); in the second every chunk folds the summaries of those before it into its own start. With
// enough sequences to fill the GPU there is one chunk and no first pass. The backward does the same from the other end.
//
// What is per step and channel (loads, softplus, gate, stores) is done once per block and kTile steps, with channels
// along the threads, and meets the lanes of the recurrence in shared memory.
//
// The forward keeps the states at every kSub-th step. The backward runs kSub steps forward from there, holding the states
// in registers, then walks them back. Sums over channels (dB, dC) go by shuffles over the warp's channels,
// by shared memory over the block's, and by `finish` over the blocks, always in the same order.
#pragma once

#include "device.cuh"
#include "selective_scan.h"

namespace {

constexpr int S = 4;                // states in a lane: what one vector load brings
constexpr int kSub = 16;            // steps between kept states
constexpr int kTile = 32;           // steps staged at a time in the forward; a multiple of kSub
constexpr int kForwardWarps = 4;    // warps per block
constexpr int kBackwardWarps = 8;
constexpr bool kHoldDecays = false; // backward: hold a step's decays from the way there, or compute them again on the way back
constexpr int kBackwardBlocks = 2;  // per SM: bounds the backward's registers
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLog2eLow = 1.92596299e-8f;  // log2(e) - kLog2e in fp32
constexpr float kLn2 = 0.6931471805599453f;
constexpr unsigned kAll = 0xffffffffu;

// What softplus and its slope are made of: exp(-|x|). EXACT: to fp32 accuracy, also where it is tiny; else to 2^-18,
// which is far below what bf16 and fp16 inputs carry.
template <bool EXACT>
__device__ __forceinline__ float exp_minus_abs(float x) {
    const float m = -fabsf(x), whole = m * kLog2e, e = exp2_fast(whole);
    if (!EXACT) return e;
    const float rest = fmaf(m, kLog2e, -whole) + m * kLog2eLow;
    return fmaf(e, rest * kLn2, e);
}

// max(x, 0) + log1p(e) with e = exp(-|x|); log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3, as a series
template <bool EXACT>
__device__ __forceinline__ float softplus_of(float x, float e) {
    const float s = e * rcp_fast(2.0f + e), q = s * s;
    float series = 1.0f / 9;
    if (EXACT) {
        series = fmaf(q, 1.0f / 13, 1.0f / 11);
        series = fmaf(q, series, 1.0f / 9);
    }
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

// Sums over the warp's channels: v[0..3] for dB and v[4..7] for dC, of four states. The sums go to row[state] and
// row[states + state], each written by one lane.
template <int LANES, int G>
__device__ __forceinline__ void sum_over_channels(float (&v)[8], int index, float* row, int states) {
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
        float sum = keep + __shfl_xor_sync(kAll, give, 4 * G);
        if constexpr (LANES > 8) sum += __shfl_xor_sync(kAll, sum, 8 * G);
        if (LANES == 8 || index < 8) row[(is_C ? states : 0) + index % 4] = sum;
    } else {
        const int first = sum_over_lanes<8, LANES, G>(v, index);
#pragma unroll
        for (int i = 0; i < 8 / LANES; i++) row[(first + i) / 4 * states + (first + i) % 4] = v[i];
    }
}

// Where a thread stands in the recurrence: lane = channel in the warp * G + g, with S states from g * S.
template <int G, int WARPS>
struct Place {
    static constexpr int kThreads = 32 * WARPS;
    static constexpr int kStates = S * G;              // N, padded
    static constexpr int kWarpChannels = 32 / G;
    static constexpr int kChannels = WARPS * kWarpChannels;  // per block
    static_assert(kThreads % kChannels == 0, "a block is whole warps of channels");

    int g, slot, channel, warp;  // slot: the channel within the block
    __device__ Place() {
        warp = threadIdx.x / 32;
        const int lane = threadIdx.x % 32;
        g = lane % G;
        slot = warp * kWarpChannels + lane / G;
        channel = blockIdx.x * kChannels + slot;
    }
};

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

// One tile of a tensor with rows of channels (or states), four columns to a thread, which keeps to them. Fetched into
// registers one tile ahead. Rows beyond the last one repeat it, and columns beyond the last repeat the last four, so that
// every load is legal without a test; whoever uses the values makes them count for nothing.
template <typename T, int STEPS, int COLUMNS, int THREADS>
struct Tile {
    static constexpr int kGroups = COLUMNS / 4;       // threads along a row
    static constexpr int kRows = THREADS / kGroups;   // rows at a time
    static constexpr int kEach = kRows < STEPS ? STEPS / kRows : 1;
    static_assert(kRows * kEach % STEPS == 0 && THREADS % kGroups == 0, "a tile is whole rows of threads");
    Four<T> held[kEach];

    static __device__ __forceinline__ int column() { return threadIdx.x % kGroups * 4; }
    static __device__ __forceinline__ int step(int k) {
        return kRows <= STEPS ? threadIdx.x / kGroups + k * kRows : threadIdx.x / kGroups % STEPS;
    }
    // where there are more threads than places, a place has several threads: its copies 0, 1, ...
    static __device__ __forceinline__ int copy() { return threadIdx.x / (kGroups * STEPS); }
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
                reinterpret_cast<float4*>(shared)[threadIdx.x + k * THREADS] =
                    there ? make_float4(x[0], x[1], x[2], x[3]) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }

    // Four copies of each row, one after the other, copy c with its states in the order s ^ c (see `permute`).
    __device__ __forceinline__ void put_permuted(float* shared, bool there) const {
        static_assert(kRows >= 4 * STEPS, "a thread for each copy of each place");
        float x[4] = {held[0][0], held[0][1], held[0][2], held[0][3]};
        permute(x, copy());
        if (copy() < 4)
            *reinterpret_cast<float4*>(shared + (step(0) * 4 + copy()) * COLUMNS + column()) =
                there ? make_float4(x[0], x[1], x[2], x[3]) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
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
template <typename T, int G, bool REVERSE, bool SOFTPLUS, bool GATED>
__global__ void __launch_bounds__(32 * kForwardWarps) scan_summary(ScanParams p) {
    using P = Place<G, kForwardWarps>;
    constexpr int threads = P::kThreads, channels = P::kChannels, states = P::kStates;
    constexpr bool exact = kExact<T>;
    MFUSER_SHARED(shared);
    float2* const steps = reinterpret_cast<float2*>(shared);           // (kTile, channels): delta and delta u (or dy)
    float* const rows = reinterpret_cast<float*>(steps + kTile * channels);  // (kTile, states): B (or C)

    const P at;
    const int chunk = blockIdx.y + (REVERSE ? 1 : 0), image = blockIdx.z;
    const int begin = chunk * p.chunk, stop = min(begin + p.chunk, p.length);
    const bool there = at.channel < p.dim;

    float a[S], h[S], total = 0.0f;
    load_states(a, p.A + int64_t(at.channel) * p.state_size, at.g, p.state_size, there);
#pragma unroll
    for (int s = 0; s < S; s++) a[s] *= kLog2e, h[s] = 0.0f;

    using Values = Tile<T, kTile, channels, threads>;
    using Rows = Tile<T, kTile, states, threads>;
    const int mine = min(int(blockIdx.x) * channels + Values::column(), p.dim - 4);  // the first staged channel
    const Four<float> bias = four_of(p.bias, mine);
    const char* const delta = corner_of<T>(p.delta, p.delta_batch, image, mine, p.dim);
    const char* const source = REVERSE ? corner_of<T>(p.dy, p.dy_batch, image, mine, p.dim)
                                       : corner_of<T>(p.u, p.u_batch, image, mine, p.dim);
    const char* const gate = GATED ? corner_of<T>(p.z, p.z_batch, image, mine, p.dim) : nullptr;
    const char* const vector = REVERSE ? corner_of<T>(p.C, p.C_batch, image, Rows::column(), p.state_size)
                                       : corner_of<T>(p.B, p.B_batch, image, Rows::column(), p.state_size);
    const int source_row = REVERSE ? p.dy_row : p.u_row, vector_row = REVERSE ? p.C_row : p.B_row;

    Values raw_delta, raw_source, raw_gate;
    Rows raw_rows;
    const int tiles = (stop - begin + kTile - 1) / kTile;
    auto fetch = [&](int tile) {
        const int64_t first = begin + tile * kTile;
        const int left = stop - int(first);
        raw_delta.fetch(delta + first * p.delta_row, p.delta_row, left);
        raw_source.fetch(source + first * source_row, source_row, left);
        if (GATED) raw_gate.fetch(gate + first * p.z_row, p.z_row, left);
        raw_rows.fetch(vector + first * vector_row, vector_row, left);
    };
    fetch(REVERSE ? tiles - 1 : 0);
    for (int i = 0; i < tiles; i++) {
        const int tile = REVERSE ? tiles - 1 - i : i, left = stop - (begin + tile * kTile);
        __syncthreads();  // the tile before has been read
#pragma unroll
        for (int k = 0; k < Values::kEach; k++) {
            const bool counts = Values::step(k) < left;  // a step beyond the end changes nothing
            float d[4], v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                d[i] = only(counts, step_size<exact>(raw_delta.held[k][i], bias[i], SOFTPLUS));
                v[i] = only(!REVERSE || counts, raw_source.held[k][i]);
                if (GATED) v[i] *= raw_gate.held[k][i] * sigmoid<exact>(raw_gate.held[k][i]);
                if (!REVERSE) v[i] *= d[i];
            }
            float4* const place = reinterpret_cast<float4*>(steps) + 2 * (threadIdx.x + k * threads);
            if (Values::covers()) {
                place[0] = make_float4(d[0], v[0], d[1], v[1]);
                place[1] = make_float4(d[2], v[2], d[3], v[3]);
            }
        }
        raw_rows.put(rows, Rows::column() < p.state_size);
        __syncthreads();
        if (i + 1 < tiles) fetch(REVERSE ? tile - 1 : tile + 1);
#pragma unroll 8
        for (int j = 0; j < kTile; j++) {
            const int t = REVERSE ? kTile - 1 - j : j;
            const float2 now = steps[t * channels + at.slot];
            float v[S];
            read_states(v, rows + t * states, at.g);
            total += now.x;
#pragma unroll
            for (int s = 0; s < S; s++) {
                const float decay = exp2_fast(now.x * a[s]);
                h[s] = REVERSE ? decay * fmaf(now.y, v[s], h[s]) : fmaf(decay, h[s], now.y * v[s]);
            }
        }
    }
    const int64_t row = (int64_t(image) * p.chunks + chunk) * p.dim + at.channel;
    store_states(p.end + row * p.state_size, h, at.g, p.state_size, there);
    if (there && at.g == 0) p.total[row] = total;
}

// Folds the summaries of chunks from, from + by, ... before `to` into h, which starts as what comes in from outside.
__device__ __forceinline__ void fold(float (&h)[S], const float (&a)[S], const ScanParams& p, int image, int from, int to,
                                     int by, int channel, int g, bool there) {
    for (int j = from; j != to; j += by) {
        const int64_t row = (int64_t(image) * p.chunks + j) * p.dim + channel;
        float end[S];
        load_states(end, p.end + row * p.state_size, g, p.state_size, there);
        const float total = there ? p.total[row] : 0.0f;
#pragma unroll
        for (int s = 0; s < S; s++) h[s] = fmaf(exp2_fast(total * a[s]), h[s], end[s]);
    }
}

template <typename T, int G, bool SOFTPLUS, bool GATED>
__global__ void __launch_bounds__(32 * kForwardWarps) scan_forward(ScanParams p) {
    using P = Place<G, kForwardWarps>;
    constexpr int threads = P::kThreads, channels = P::kChannels, states = P::kStates;
    static_assert(kTile % G == 0 && kSub % G == 0 && kTile % kSub == 0, "steps are reduced G at a time");
    MFUSER_SHARED(shared);
    float2* const steps = reinterpret_cast<float2*>(shared);                 // (kTile, channels): delta, delta u; then y
    float* const B_rows = reinterpret_cast<float*>(steps + kTile * channels);  // (kTile, states)
    float* const C_rows = B_rows + kTile * states;

    const P at;
    const int chunk = blockIdx.y, image = blockIdx.z;
    const int begin = chunk * p.chunk, stop = min(begin + p.chunk, p.length);
    const bool there = at.channel < p.dim;

    float a[S], h[S];
    load_states(a, p.A + int64_t(at.channel) * p.state_size, at.g, p.state_size, there);
#pragma unroll
    for (int s = 0; s < S; s++) a[s] *= kLog2e, h[s] = 0.0f;
    const int64_t corner = (int64_t(image) * p.dim + at.channel) * p.state_size;
    if (p.initial) load_states(h, p.initial + corner, at.g, p.state_size, there);
    fold(h, a, p, image, 0, chunk, 1, at.channel, at.g, there);

    constexpr bool exact = kExact<T>;
    using Values = Tile<T, kTile, channels, threads>;
    using Rows = Tile<T, kTile, states, threads>;
    const bool staged = int(blockIdx.x) * channels + Values::column() < p.dim;
    const int mine = min(int(blockIdx.x) * channels + Values::column(), p.dim - 4);
    const Four<float> bias = four_of(p.bias, mine), skip = four_of(p.D, mine);
    const char* const delta = corner_of<T>(p.delta, p.delta_batch, image, mine, p.dim);
    const char* const u = corner_of<T>(p.u, p.u_batch, image, mine, p.dim);
    const char* const z = GATED ? corner_of<T>(p.z, p.z_batch, image, mine, p.dim) : nullptr;
    const char* const B = corner_of<T>(p.B, p.B_batch, image, Rows::column(), p.state_size);
    const char* const C = corner_of<T>(p.C, p.C_batch, image, Rows::column(), p.state_size);
    const bool padded = Rows::column() >= p.state_size;
    T* const y = static_cast<T*>(p.y) + int64_t(image) * p.length * p.dim + mine;
    const int kept = (p.length + kSub - 1) / kSub;

    Values raw_delta, raw_u;
    Rows raw_B, raw_C;
    auto fetch = [&](int64_t first) {
        const int left = stop - int(first);
        raw_delta.fetch(delta + first * p.delta_row, p.delta_row, left);
        raw_u.fetch(u + first * p.u_row, p.u_row, left);
        raw_B.fetch(B + first * p.B_row, p.B_row, left);
        raw_C.fetch(C + first * p.C_row, p.C_row, left);
    };
    fetch(begin);
    for (int first = begin; first < stop; first += kTile) {
        const Values held_u = raw_u;
        Values raw_z;
#pragma unroll
        for (int k = 0; k < Values::kEach; k++) {
            const bool counts = Values::step(k) < stop - first;  // a step beyond the end changes nothing
            float d[4], v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                d[i] = only(counts, step_size<exact>(raw_delta.held[k][i], bias[i], SOFTPLUS));
                v[i] = d[i] * raw_u.held[k][i];
            }
            float4* const place = reinterpret_cast<float4*>(steps) + 2 * (threadIdx.x + k * threads);
            if (Values::covers()) {
                place[0] = make_float4(d[0], v[0], d[1], v[1]);
                place[1] = make_float4(d[2], v[2], d[3], v[3]);
            }
        }
        raw_B.put(B_rows, !padded);
        raw_C.put(C_rows, !padded);
        __syncthreads();
        if (first + kTile < stop) fetch(first + kTile);
        if (GATED) raw_z.fetch(z + int64_t(first) * p.z_row, p.z_row, stop - first);
#pragma unroll 1
        for (int t0 = 0; t0 < kTile; t0 += kSub) {
            if (p.saved && first + t0 < stop) {
                const int64_t row = (int64_t(image) * kept + (first + t0) / kSub) * p.dim + at.channel;
                store_states(p.saved + row * p.state_size, h, at.g, p.state_size, there);
            }
#pragma unroll
            for (int t1 = 0; t1 < kSub; t1 += G) {
                float sums[G];
#pragma unroll
                for (int j = 0; j < G; j++) {
                    const int t = t0 + t1 + j;
                    const float2 now = steps[t * channels + at.slot];
                    float b[S], c[S], sum = 0.0f;
                    read_states(b, B_rows + t * states, at.g);
                    read_states(c, C_rows + t * states, at.g);
#pragma unroll
                    for (int s = 0; s < S; s++) {
                        h[s] = fmaf(exp2_fast(now.x * a[s]), h[s], now.y * b[s]);
                        sum = fmaf(h[s], c[s], sum);
                    }
                    sums[j] = sum;
                }
                sum_over_lanes<G, G, 1>(sums, at.g);
                // the G lanes of the channel have read these steps: y takes their place
                steps[(t0 + t1 + at.g) * channels + at.slot].x = sums[0];
            }
        }
        __syncthreads();
        T* const out = y + int64_t(first) * p.dim;
#pragma unroll
        for (int k = 0; k < Values::kEach; k++) {
            if (!Values::covers() || !staged || Values::step(k) >= stop - first) continue;
            const float4* const place = reinterpret_cast<const float4*>(steps) + 2 * (threadIdx.x + k * threads);
            const float4 low = place[0], high = place[1];
            const float sums[4] = {low.x, low.z, high.x, high.z};
            Four<T> value;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float x = fmaf(skip[i], held_u.held[k][i], sums[i]);
                if (GATED) x *= raw_z.held[k][i] * sigmoid<exact>(raw_z.held[k][i]);
                value.v[i] = from_float<T>(x);
            }
            *reinterpret_cast<Four<T>*>(out + int64_t(Values::step(k)) * p.dim) = value;
        }
        __syncthreads();  // B and C rows have been read, too
    }
    if (stop == p.length) store_states(p.state + corner, h, at.g, p.state_size, there);
}

template <typename T, int G, bool SOFTPLUS, bool GATED>
__global__ void __launch_bounds__(32 * kBackwardWarps, kBackwardBlocks) scan_backward(ScanParams p) {
    using P = Place<G, kBackwardWarps>;
    constexpr int threads = P::kThreads, channels = P::kChannels, states = P::kStates, lanes = P::kWarpChannels;
    // With eight channels or more in a warp, lanes hold their four states in an order of their own, so that halving sums
    // over channels need not choose registers by lane: see sum_over_channels.
    constexpr bool permuted = lanes >= 8;
    constexpr int copies = permuted ? 4 : 1;
    MFUSER_SHARED(shared);
    float4* const steps = reinterpret_cast<float4*>(shared);  // (kSub, channels): delta, delta u, dy, -; then delta, gB, dd, y
    float* const B_rows = reinterpret_cast<float*>(steps + kSub * channels);  // (kSub, states)
    float* const C_rows = B_rows + kSub * states * copies;
    float* const over_warps = C_rows + kSub * states * copies;  // (warps, kSub, 2, states): dB and dC of each warp's channels
    // (8, threads): dD and dbias of each thread's four channels; seldom touched, and registers are dear
    LongSum* const ends = reinterpret_cast<LongSum*>(over_warps + kBackwardWarps * kSub * 2 * states);
#pragma unroll
    for (int i = 0; i < 8; i++) ends[i * threads + threadIdx.x] = LongSum();

    const P at;
    const int chunk = blockIdx.y, image = blockIdx.z;
    const int begin = chunk * p.chunk, stop = min(begin + p.chunk, p.length);
    const bool there = at.channel < p.dim;

    float A[S], a[S], later[S];  // later: exp(delta[t+1] A) g[t+1]
    LongSum dA[S];
    const int index = threadIdx.x % 32 / G, order = permuted ? index % 4 : 0;  // register s holds state s ^ order
    load_states(A, p.A + int64_t(at.channel) * p.state_size, at.g, p.state_size, there);
#pragma unroll
    for (int s = 0; s < S; s++) a[s] = A[s] * kLog2e, later[s] = 0.0f;
    const int64_t corner = (int64_t(image) * p.dim + at.channel) * p.state_size;
    if (p.dstate) load_states(later, p.dstate + corner, at.g, p.state_size, there);
    fold(later, a, p, image, p.chunks - 1, chunk, -1, at.channel, at.g, there);
    permute(A, order), permute(a, order), permute(later, order);

    constexpr bool exact = kExact<T>;
    using Values = Tile<T, kSub, channels, threads>;
    using Rows = Tile<T, kSub, states, threads>;
    const bool staged = int(blockIdx.x) * channels + Values::column() < p.dim;
    const int mine = min(int(blockIdx.x) * channels + Values::column(), p.dim - 4);
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

    Values raw_delta, raw_u, raw_dy, raw_z;
    Rows raw_B, raw_C;
    auto fetch = [&](int64_t first) {
        const int left = stop - int(first);
        raw_delta.fetch(delta + first * p.delta_row, p.delta_row, left);
        raw_u.fetch(u + first * p.u_row, p.u_row, left);
        raw_dy.fetch(dy + first * p.dy_row, p.dy_row, left);
        if (GATED) raw_z.fetch(z + first * p.z_row, p.z_row, left);
        raw_B.fetch(B + first * p.B_row, p.B_row, left);
        raw_C.fetch(C + first * p.C_row, p.C_row, left);
    };
    const int last = begin + (stop - begin - 1) / kSub * kSub;
    fetch(last);
    for (int first = last; first >= begin; first -= kSub) {
        const Values held_delta = raw_delta, held_u = raw_u, held_dy = raw_dy, held_z = raw_z;
#pragma unroll
        for (int k = 0; k < Values::kEach; k++) {
            // a step beyond the end, or a channel: no decay, no inflow, no gradient
            const bool counts = staged && Values::step(k) < stop - first;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float d = only(counts, step_size<exact>(held_delta.held[k][i], bias[i], SOFTPLUS));
                float g = only(counts, held_dy.held[k][i]);
                if (GATED) g *= held_z.held[k][i] * sigmoid<exact>(held_z.held[k][i]);
                if (Values::covers())
                    steps[4 * (threadIdx.x + k * threads) + i] = make_float4(d, d * held_u.held[k][i], g, 0.0f);
            }
        }
        if constexpr (permuted) {
            raw_B.put_permuted(B_rows, !padded);
            raw_C.put_permuted(C_rows, !padded);
        } else {
            raw_B.put(B_rows, !padded);
            raw_C.put(C_rows, !padded);
        }
        __syncthreads();
        if (first > begin) fetch(first - kSub);

        // forward again: h[i] is the state before step i
        float h[kSub + 1][S], decays[kHoldDecays ? kSub : 1][S];
        const int64_t row = (int64_t(image) * kept + first / kSub) * p.dim + at.channel;
        load_states(h[0], p.saved + row * p.state_size, at.g, p.state_size, there);
        permute(h[0], order);
#pragma unroll
        for (int t = 0; t < kSub; t++) {
            const float4 now = steps[t * channels + at.slot];
            float b[S];
            read_states(b, B_rows + (t * copies + order) * states, at.g);
#pragma unroll
            for (int s = 0; s < S; s++) {
                const float decay = exp2_fast(now.x * a[s]);
                if (kHoldDecays) decays[t][s] = decay;
                h[t + 1][s] = fmaf(decay, h[t][s], now.y * b[s]);
            }
        }
        float tile_dA[S] = {};
#pragma unroll
        for (int t1 = kSub - G; t1 >= 0; t1 -= G) {
            float gB[G], dd[G], y[G];
#pragma unroll
            for (int j = G - 1; j >= 0; j--) {
                const int t = t1 + j;
                const float4 now = steps[t * channels + at.slot];
                float b[S], c[S], both[2 * S];
                read_states(b, B_rows + (t * copies + order) * states, at.g);
                read_states(c, C_rows + (t * copies + order) * states, at.g);
                gB[j] = dd[j] = y[j] = 0.0f;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    const float g = fmaf(now.z, c[s], later[s]);
                    both[s] = g * now.y;                 // dB
                    both[S + s] = now.z * h[t + 1][s];   // dC
                    gB[j] = fmaf(g, b[s], gB[j]);
                    later[s] = (kHoldDecays ? decays[t][s] : exp2_fast(now.x * a[s])) * g;
                    const float carried = later[s] * h[t][s];
                    tile_dA[s] = fmaf(carried, now.x, tile_dA[s]);
                    dd[j] = fmaf(carried, A[s], dd[j]);
                    if (GATED) y[j] = fmaf(h[t + 1][s], c[s], y[j]);
                }
                sum_over_channels<lanes, G>(both, index, over_warps + (at.warp * kSub + t) * 2 * states + at.g * S, states);
            }
            sum_over_lanes<G, G, 1>(gB, at.g);
            sum_over_lanes<G, G, 1>(dd, at.g);
            if (GATED) sum_over_lanes<G, G, 1>(y, at.g);
            float4* const done = steps + (t1 + at.g) * channels + at.slot;
            done->y = gB[0], done->z = dd[0], done->w = y[0];
        }
#pragma unroll
        for (int s = 0; s < S; s++) dA[s].add(tile_dA[s]);
        __syncthreads();

        float tile_dD[4] = {}, tile_dbias[4] = {};
        const int64_t tile = out + int64_t(first) * p.dim;
#pragma unroll
        for (int k = 0; k < Values::kEach; k++) {
            if (!Values::covers() || !staged || Values::step(k) >= stop - first) continue;
            const int64_t place = tile + int64_t(Values::step(k)) * p.dim;
            Four<T> du, ddelta, dz;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4 now = steps[4 * (threadIdx.x + k * threads) + i];
                const float x = held_u.held[k][i];
                float g = held_dy.held[k][i];
                if (GATED) {
                    const float gate = held_z.held[k][i], share = sigmoid<exact>(gate);
                    dz.v[i] = from_float<T>(g * fmaf(skip[i], x, now.w) * share * fmaf(gate, 1.0f - share, 1.0f));
                    g *= gate * share;
                }
                float dstep = fmaf(now.y, x, now.z);
                if (SOFTPLUS) dstep *= sigmoid<exact>(held_delta.held[k][i] + bias[i]);
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
            ends[i * threads + threadIdx.x].add(tile_dD[i]);
            ends[(4 + i) * threads + threadIdx.x].add(tile_dbias[i]);
        }
        for (int i = threadIdx.x; i < kSub * 2 * states; i += threads) {
            const int t = first + i / (2 * states), n = i % states;
            if (t >= stop || n >= p.state_size) continue;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kBackwardWarps; w++) sum += over_warps[w * kSub * 2 * states + i];
            float* const part = i / states % 2 ? p.part_C : p.part_B;
            part[((int64_t(blockIdx.x) * p.batch + image) * p.length + t) * p.state_size + n] = sum;
        }
        __syncthreads();
    }

    const int64_t place = (int64_t(image) * p.chunks + chunk) * p.dim;
    float dA_sum[S];
#pragma unroll
    for (int s = 0; s < S; s++) dA_sum[s] = dA[s].sum;
    permute(dA_sum, order), permute(later, order);
    store_states(p.part_A + (place + at.channel) * p.state_size, dA_sum, at.g, p.state_size, there);
    if (chunk == 0 && p.dinitial) store_states(p.dinitial + corner, later, at.g, p.state_size, there);

    // the sums of all threads that staged a channel
    if (threadIdx.x < channels) {
        const int group = threadIdx.x / 4, i = threadIdx.x % 4, channel = blockIdx.x * channels + threadIdx.x;
        float sum_D = 0.0f, sum_bias = 0.0f;
        for (int t = group; t < threads; t += Values::kGroups) {
            sum_D += ends[i * threads + t].sum;
            sum_bias += ends[(4 + i) * threads + t].sum;
        }
        if (channel < p.dim) {
            p.part_D[place + channel] = sum_D;
            p.part_bias[place + channel] = sum_bias;
        }
    }
}

// Adds up the parts, each sum by one thread and in order: dB, dC over channel blocks; dA, dD, dbias over images and chunks.
template <typename T>
__global__ void __launch_bounds__(256) scan_finish(ScanParams p, int blocks) {
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

template <int G, int WARPS>
dim3 grid_of(const ScanParams& p, int chunks) {
    constexpr int channels = Place<G, WARPS>::kChannels;
    return dim3((p.dim + channels - 1) / channels, chunks, p.batch);
}

template <typename T, int G, bool SOFTPLUS, bool GATED>
cudaError_t forward(const ScanParams& p, void* stream) {
    using P = Place<G, kForwardWarps>;
    constexpr size_t steps = kTile * P::kChannels * sizeof(float2), rows = kTile * P::kStates * sizeof(float);
    if (p.chunks > 1) {
        const dim3 grid = grid_of<G, kForwardWarps>(p, p.chunks - 1);
        const cudaError_t error =
            MFUSER_LAUNCH((scan_summary<T, G, false, SOFTPLUS, false>), grid, P::kThreads, steps + rows, stream, p);
        if (error != cudaSuccess) return error;
    }
    const dim3 grid = grid_of<G, kForwardWarps>(p, p.chunks);
    return MFUSER_LAUNCH((scan_forward<T, G, SOFTPLUS, GATED>), grid, P::kThreads, steps + 2 * rows, stream, p);
}

template <typename T, int G, bool SOFTPLUS, bool GATED>
cudaError_t backward(const ScanParams& p, void* stream) {
    if (p.chunks > 1) {
        using P = Place<G, kForwardWarps>;
        constexpr size_t bytes = kTile * (P::kChannels * sizeof(float2) + P::kStates * sizeof(float));
        const dim3 grid = grid_of<G, kForwardWarps>(p, p.chunks - 1);
        const cudaError_t error =
            MFUSER_LAUNCH((scan_summary<T, G, true, SOFTPLUS, GATED>), grid, P::kThreads, bytes, stream, p);
        if (error != cudaSuccess) return error;
    }
    using P = Place<G, kBackwardWarps>;
    constexpr size_t bytes =
        kSub * (P::kChannels * sizeof(float4) + 2 * P::kStates * sizeof(float) * ((G <= 4 ? 4 : 1) + kBackwardWarps)) +
        8 * P::kThreads * sizeof(LongSum);
    const dim3 grid = grid_of<G, kBackwardWarps>(p, p.chunks);
    const cudaError_t error = MFUSER_LAUNCH((scan_backward<T, G, SOFTPLUS, GATED>), grid, P::kThreads, bytes, stream, p);
    if (error != cudaSuccess) return error;
    const int64_t all = 2 * int64_t(p.batch) * p.length * p.state_size + int64_t(p.dim) * (p.state_size + 2);
    return MFUSER_LAUNCH((scan_finish<T>), dim3((all + 255) / 256), 256, 0, stream, p, int(grid.x));
}

// a template argument for each switch
template <typename T, int G>
cudaError_t forward_as(const ScanParams& p, void* stream) {
    if (p.softplus) return p.z ? forward<T, G, true, true>(p, stream) : forward<T, G, true, false>(p, stream);
    return p.z ? forward<T, G, false, true>(p, stream) : forward<T, G, false, false>(p, stream);
}

template <typename T, int G>
cudaError_t backward_as(const ScanParams& p, void* stream) {
    if (p.softplus) return p.z ? backward<T, G, true, true>(p, stream) : backward<T, G, true, false>(p, stream);
    return p.z ? backward<T, G, false, true>(p, stream) : backward<T, G, false, false>(p, stream);
}

inline bool well_formed(const ScanParams& p) {
    return p.sub == kSub && p.chunk % kSub == 0 && p.dim % 4 == 0 && p.state_size % 4 == 0 && p.state_size <= 64;
}

// lanes per channel by N: 8 and 16 states fit exactly, others are padded with zeros
template <typename T>
cudaError_t forward_any(const ScanParams& p, void* stream) {
    if (!well_formed(p)) return cudaErrorInvalidValue;
    if (p.state_size <= 8) return forward_as<T, 2>(p, stream);
    if (p.state_size <= 16) return forward_as<T, 4>(p, stream);
    return forward_as<T, 16>(p, stream);
}

template <typename T>
cudaError_t backward_any(const ScanParams& p, void* stream) {
    if (!well_formed(p)) return cudaErrorInvalidValue;
    if (p.state_size <= 8) return backward_as<T, 2>(p, stream);
    if (p.state_size <= 16) return backward_as<T, 4>(p, stream);
    return backward_as<T, 16>(p, stream);
}

}  // namespace
