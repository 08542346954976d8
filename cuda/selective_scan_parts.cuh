// What the kernels of the selective scan share: constants, functions, places of lanes, tiles of steps.
#pragma once

#include <cstdint>

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
// steps staged at a time in the forward, a multiple of kSub
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

// 2^x for a state's decay over a step. EXACT: near 1 as 1 plus a polynomial in x, whose error is 5.6e-8 at most and 3e-10 on
// average. The unit of exponentials is off by up to 1.2e-7, and by 2e-8 on average: alike for neighbouring x, so that a state
// that keeps nearly all of its value in a step adds it up over the many steps for which it lasts.
template <bool EXACT>
__device__ __forceinline__ float decay_of(float x) {
    if (!EXACT) return exp2_fast(x);
    float p = fmaf(x, 0.00900435634f, 0.0554168262f);
    p = fmaf(x, p, 0.240222991f);
    p = fmaf(x, p, 0.693147182f);
    p = fmaf(x, p, 1.0f);
    // as integers, -1/4 < x <= -0 are the smallest: one comparison
    return __float_as_int(x) < __float_as_int(-0.25f) ? p : exp2_fast(x);
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

// One tile of a tensor with rows of channels (or states), four columns to each of THREADS threads (a warp or the block; `me`
// is the place among them), which keep to them. Fetched into registers one tile ahead. Rows beyond the last one repeat it,
// and columns beyond the last repeat the last four, so that every load is legal without a test; whoever uses the values
// makes them count for nothing.
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

// Folds the summaries of chunks from, from + by, ... before `to` into h, which starts as what comes in from outside.
template <bool EXACT, typename P>
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
            for (int s = 0; s < S; s++) h[k][s] = fmaf(decay_of<EXACT>(total * a[k][s]), h[k][s], end[s]);
        }
    }
}

}  // namespace
