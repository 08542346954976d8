// The selective scan: the first pass of either direction, and the forward.
#pragma once

#include "selective_scan_parts.cuh"

namespace {

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
                    const bool by_hand = !exact && k * S + s < kByHand;
                    const float x = now.x * a[k][s], decay = by_hand ? exp2_by_hand(x) : decay_of<exact>(x);
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
    fold<exact>(h, a, p, image, 0, chunk, 1, at);
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
                            h[k][s] = fmaf(decay_of<exact>(now.x * a[k][s]), h[k][s], now.y * b[s]);
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

}  // namespace
