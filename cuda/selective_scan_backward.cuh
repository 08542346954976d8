// The selective scan: the backward, and the sums over its blocks.
#pragma once

#include "selective_scan_parts.cuh"

namespace {

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
    // dy lies behind each, and with a gate z behind that and delta before
    T *raw_u = raw + Values::kSize, *other_u = raw + (GATED ? 5 : 3) * Values::kSize;
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
    fold<exact>(later, a, p, image, p.chunks - 1, chunk, -1, at);
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
                for (int s = 0; s < S; s++) to[k][s] = fmaf(decay_of<exact>(now.x * a[k][s]), from[k][s], now.y * b[s]);
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
                            later[k][s] = decay_of<exact>(now.x * a[k][s]) * g;
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

}  // namespace
