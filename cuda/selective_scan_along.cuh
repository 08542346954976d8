// The selective scan's forward in one pass, each exponential computed once: lanes lie along the sequence.
//
// A lane has STEPS steps of two neighbouring channels, a warp 32 times as many (a turn), and the four warps of a team the
// four pairs of a block's eight channels. For one state after the other, a lane runs its steps from zero, holding decays and
// inflows in registers; the warp turns the lanes' ends into the states before each lane; and every lane runs its steps again
// from there, without a new exponential, and adds to its outputs, which stay in registers through all states.
//
// The turns of a pair follow one another: what one hands on of a state, the next one takes before it adds up its lanes. The
// teams of a block have turns in turn, each a few states behind the one before, so that one is staged while others compute.
//
// Adding up takes half the shuffles with two channels: neighbouring lanes swap ends, so that the even one has both lanes'
// ends of its channel, the odd one those of the other, and 16 pairs of lanes are added up for both channels at once. A lane
// calls the channel whose sum it makes its own; it is in slot 0, the neighbour's in slot 1.
#pragma once

#include <type_traits>

#include "selective_scan_parts.cuh"

namespace {

constexpr int kPairs = 4;                      // of channels in a block
constexpr int kTeamThreads = 32 * kPairs;
constexpr int kAlongStates = 16;               // at most

template <typename T>
struct alignas(2 * sizeof(T)) Couple {
    T v[2];
};

template <typename T>
__device__ __forceinline__ void widen(Couple<T> x, float& first, float& second) {
    if constexpr (std::is_same_v<T, bf16>) {
        // bf16 is the upper half of fp32: one instruction each, for which two must come as one word
        const union {
            Couple<T> couple;
            unsigned word;
        } same{x};
        first = __uint_as_float(same.word << 16), second = __uint_as_float(same.word & 0xFFFF0000u);
    } else {
        first = to_float(x.v[0]), second = to_float(x.v[1]);
    }
}

template <typename T>
__device__ __forceinline__ Couple<T> swapped_if(int odd, Couple<T> x) {
    if constexpr (sizeof(T) == 2) {
        union {
            Couple<T> couple;
            unsigned word;
        } same{x};
        same.word = same.word << 16 * odd | same.word >> (32 - 16 * odd & 31);
        return same.couple;
    } else {
        Couple<T> other;
        other.v[0] = odd ? x.v[1] : x.v[0], other.v[1] = odd ? x.v[0] : x.v[1];
        return other;
    }
}

// Puts the steps of the lane that is `lanes` before this one ahead of its own, where there is such a lane.
template <bool DECAYS>
__device__ __forceinline__ void add_steps_before(float& end, float& through, int lanes) {
#ifdef MFUSER_ON_CPU
    const float its_end = __shfl_up_sync(kAll, end, lanes), its_through = __shfl_up_sync(kAll, through, lanes);
    if (int(threadIdx.x % 32) < lanes) return;
    end = fmaf(through, its_end, end);
    if (DECAYS) through *= its_through;
#else
    // the shuffle itself says whether there is one: nvcc would compare lanes, and move what both ways of an `if` give
    if constexpr (DECAYS) {
        asm volatile("{\n\t.reg .pred there;\n\t.reg .f32 its_end, its_through;\n\t"
            "shfl.sync.up.b32 its_end|there, %0, %2, 0, -1;\n\t"
            "shfl.sync.up.b32 its_through, %1, %2, 0, -1;\n\t"
            "@there fma.rn.f32 %0, %1, its_end, %0;\n\t"
            "@there mul.f32 %1, %1, its_through;\n\t}"
            : "+f"(end), "+f"(through)
            : "r"(lanes));
    } else {
        asm volatile("{\n\t.reg .pred there;\n\t.reg .f32 its_end;\n\t"
            "shfl.sync.up.b32 its_end|there, %0, %2, 0, -1;\n\t"
            "@there fma.rn.f32 %0, %1, its_end, %0;\n\t}"
            : "+f"(end)
            : "f"(through), "r"(lanes));
    }
#endif
}

// Shared memory: that of the block, then that of each team.
template <typename T, int STEPS, int TEAMS, int BUFFERS, bool GATED, bool KEEP>
struct AlongMemory {
    static constexpr int kTurn = 32 * STEPS, kFours = STEPS / 4;
    // block: a is (states, 2, kPairs) of float2, in the order of even and of odd lanes; handed (states, 2 kPairs)
    static constexpr int kA = kAlongStates * 2 * kPairs * int(sizeof(float2));
    static constexpr int kHanded = kAlongStates * 2 * kPairs * int(sizeof(Handed));
    // team: rows of B, then C: (states, kFours, 32 lanes) of float4. A lane's fours are apart, so that lanes read and threads
    // write neighbours; the gap is for threads that write fours of one lane.
    static constexpr int kFour = 128 + (32 / kFours + 3) / 4 * 4;
    static constexpr int kRow = kFours * kFour;
    static constexpr int kRows = 2 * kAlongStates * kRow * int(sizeof(float));
    // raw delta, u, z: (BUFFERS turns, tensors, kPairs / 2, steps) of four channels; a gap behind a lane's steps
    static constexpr int kTensors = GATED ? 3 : 2;
    static constexpr int kValues = kTurn + 32;
    static constexpr int kTensor = kPairs / 2 * kValues;
    static constexpr int kRaw = BUFFERS * kTensors * kTensor * int(sizeof(Four<T>));
    // kept states: (kTurn / kSub, 2 kPairs, states) of float
    static constexpr int kKeptRow = 2 * kPairs * kAlongStates + 4;
    static constexpr int kKept = KEEP ? kTurn / kSub * kKeptRow * int(sizeof(float)) : 0;
    static constexpr int kTeam = kRows + kRaw + kKept;
    static constexpr int kBytes = kA + kHanded + TEAMS * kTeam;
    static_assert(kRaw % 16 == 0 && kRows % 16 == 0 && kTurn % kSub == 0, "teams are aligned to 16 bytes");
};

template <typename T, int STEPS, int TEAMS, int BUFFERS, int ABREAST, bool SOFTPLUS, bool GATED, bool KEEP>
__global__ void __launch_bounds__(kTeamThreads * TEAMS, 1) scan_along(ScanParams p) {
    using M = AlongMemory<T, STEPS, TEAMS, BUFFERS, GATED, KEEP>;
    constexpr int kTurn = M::kTurn, kFours = M::kFours, channels = 2 * kPairs;
    constexpr bool exact = kExact<T>;
    MFUSER_SHARED(shared);
    const int team = threadIdx.x / kTeamThreads, thread = threadIdx.x % kTeamThreads;
    const int pair = thread / 32, lane = thread % 32, odd = lane & 1;
    float2* const a_of = reinterpret_cast<float2*>(shared);
    Handed* const handed_on = reinterpret_cast<Handed*>(shared + M::kA);
    unsigned char* const memory = shared + M::kA + M::kHanded + team * M::kTeam;
    float* const rows = reinterpret_cast<float*>(memory);
    Four<T>* const raw = reinterpret_cast<Four<T>*>(memory + M::kRows);
    float* const kept = reinterpret_cast<float*>(memory + M::kRows + M::kRaw);

    const int first = blockIdx.x * channels, image = blockIdx.y, states = p.state_size;
    const int turns = (p.length + kTurn - 1) / kTurn;
    // the four channels that this thread moves, and the two that its warp computes; one beyond the last takes the last ones
    constexpr int kFoursOfRow = kPairs / 2, kRowsAtOnce = kTeamThreads / kFoursOfRow;
    const int moved = thread % kFoursOfRow, moved_row = thread / kFoursOfRow;
    const int mine = min(first + 4 * moved, p.dim - 4), own = min(first + 2 * pair, p.dim - 2);
    const auto corner = [&](const void* base, int64_t batch, int column) {
        return reinterpret_cast<const char*>(static_cast<const T*>(base) + image * batch + column);
    };
    const char* const delta = corner(p.delta, p.delta_batch, mine);
    const char* const u = corner(p.u, p.u_batch, mine);
    const char* const z = GATED ? corner(p.z, p.z_batch, mine) : nullptr;
    const char* const B = corner(p.B, p.B_batch, 0);
    const char* const C = corner(p.C, p.C_batch, 0);
    T* const result = static_cast<T*>(p.y) + int64_t(image) * p.length * p.dim + mine;
    // of the lane's own channel, then the other
    float bias[2], skip[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        bias[k] = p.bias ? p.bias[own + (k ^ odd)] : 0.0f;
        skip[k] = p.D ? p.D[own + (k ^ odd)] : 0.0f;
    }

    const auto values_of = [&](int turn) { return raw + turn / TEAMS % BUFFERS * M::kTensors * M::kTensor; };
    const auto fetch = [&](int turn) {
        const int begin = turn * kTurn, left = p.length - begin;
        Four<T>* const to = values_of(turn) + moved * M::kValues;
        const char* const delta_at = delta + int64_t(begin) * p.delta_row;
        const char* const u_at = u + int64_t(begin) * p.u_row;
        const char* const z_at = GATED ? z + int64_t(begin) * p.z_row : nullptr;
#pragma unroll
        for (int k = 0; k < kTurn / kRowsAtOnce; k++) {
            const int t = moved_row + kRowsAtOnce * k, row = min(t, left - 1);
            Four<T>* const place = to + t + t / STEPS;
            copy_async<sizeof(Four<T>)>(place, delta_at + row * p.delta_row);
            copy_async<sizeof(Four<T>)>(place + M::kTensor, u_at + row * p.u_row);
            if (GATED) copy_async<sizeof(Four<T>)>(place + 2 * M::kTensor, z_at + row * p.z_row);
        }
    };
    const auto turned = [&](Couple<T> x, float& own, float& other) { widen(swapped_if(odd, x), own, other); };

    // four steps of four states at a time; states beyond the last repeat it and are not read
    const auto stage = [&](int turn) {
        const int begin = turn * kTurn, left = p.length - begin;
        for (int i = thread; i < 2 * 8 * STEPS; i += kTeamThreads) {
            const bool is_C = i >= 8 * STEPS;
            const int four = is_C ? i - 8 * STEPS : i;
            const int row = is_C ? p.C_row : p.B_row;
            const char* const base = (is_C ? C : B) + int64_t(begin) * row;
            const char* from[4];
#pragma unroll
            for (int t = 0; t < 4; t++) from[t] = base + min(4 * four + t, left - 1) * row;  // in 31 bits
            float* const to = rows + (is_C ? kAlongStates * M::kRow : 0) + four % kFours * M::kFour + four / kFours * 4;
            alignas(sizeof(Four<T>)) Couple<T> x[4][kAlongStates / 2];
#pragma unroll
            for (int quarter = 0; quarter < kAlongStates / 4; quarter++) {
                const int column = min(4 * quarter, states - 4) * int(sizeof(T));
#pragma unroll
                for (int t = 0; t < 4; t++)
                    *reinterpret_cast<Four<T>*>(&x[t][2 * quarter]) = *reinterpret_cast<const Four<T>*>(from[t] + column);
            }
#pragma unroll
            for (int n = 0; n < kAlongStates; n += 2) {
                float4 even, odd;
                widen(x[0][n / 2], even.x, odd.x), widen(x[1][n / 2], even.y, odd.y);
                widen(x[2][n / 2], even.z, odd.z), widen(x[3][n / 2], even.w, odd.w);
                *reinterpret_cast<float4*>(to + n * M::kRow) = even;
                *reinterpret_cast<float4*>(to + (n + 1) * M::kRow) = odd;
            }
        }
    };

    if (team < turns) fetch(team), stage(team);
    for (int i = threadIdx.x; i < states * channels; i += kTeamThreads * TEAMS) {
        const int n = i / channels, c = i % channels, channel = min(first + c, p.dim - 1);
        const float a = p.A[int64_t(channel) * states + n] * kLog2e;
        float* const to = reinterpret_cast<float*>(a_of + n * 2 * kPairs + c / 2);
        to[c % 2] = a, to[2 * kPairs + 1 - c % 2] = a;
        const int64_t place = (int64_t(image) * p.dim + channel) * states + n;
        handed_on[i] = handed(p.initial ? p.initial[place] : 0.0f, 0);
    }
    __syncthreads();
    for (int turn = team; turn < turns; turn += TEAMS) {
        const int begin = turn * kTurn, left = p.length - begin;
        if (turn != team) {
            if (BUFFERS == 1) fetch(turn);  // where this thread has read the turn before
            stage(turn);
        }
        copies_done();
        team_barrier(1 + team, kTeamThreads);
        if (BUFFERS > 1 && turn + TEAMS < turns) fetch(turn + TEAMS);

        const int at = lane * STEPS;  // in the turn
        Couple<T>* const mine_at =
            reinterpret_cast<Couple<T>*>(values_of(turn) + pair / 2 * M::kValues + lane * (STEPS + 1)) + pair % 2;
        float d[2][STEPS], v[2][STEPS], y[2][STEPS];  // delta, delta u, y
        float total[2] = {};
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            float step[2], x[2];
            turned(mine_at[2 * t], step[0], step[1]);
            turned(mine_at[2 * (M::kTensor + t)], x[0], x[1]);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                // a step beyond the end changes nothing
                d[k][t] = only(at + t < left, step_size<exact>(step[k], bias[k], SOFTPLUS));
                v[k][t] = d[k][t] * x[k], y[k][t] = skip[k] * x[k];
                total[k] += d[k][t];
            }
        }
        // of the own channel, over the even lane's steps and the odd one's
        const float others = __shfl_xor_sync(kAll, total[1], 1);
        const float total_even = odd ? others : total[0], total_odd = odd ? total[0] : others;

        const float* b_at = rows + lane * 4;
        const float2* a_at = a_of + odd * kPairs + pair;
        Handed* handed_at = handed_on + 2 * pair + odd;
#pragma unroll 1
        for (int n = 0; n < states; n += ABREAST) {
            float decay[ABREAST][2][STEPS], inflow[ABREAST][2][STEPS], h[ABREAST][2];
            float even_decay[ABREAST], even_end[ABREAST], through[ABREAST], end[ABREAST], before[ABREAST];
#pragma unroll
            for (int m = 0; m < ABREAST; m++) {
                const float2 both = a_at[m * 2 * kPairs];
                const float a[2] = {both.x, both.y};
#pragma unroll
                for (int j = 0; j < kFours; j++) {
                    const float4 four = *reinterpret_cast<const float4*>(b_at + m * M::kRow + j * M::kFour);
                    const float b[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int t = 4 * j + i;
#pragma unroll
                        for (int k = 0; k < 2; k++) {
                            decay[m][k][t] = decay_of<exact>(d[k][t] * a[k]);
                            inflow[m][k][t] = v[k][t] * b[i];
                            h[m][k] = t ? fmaf(decay[m][k][t], h[m][k], inflow[m][k][t]) : inflow[m][k][t];
                        }
                    }
                }
                even_decay[m] = decay_of<exact>(total_even * a[0]), through[m] = decay_of<exact>(total_odd * a[0]);
            }
#pragma unroll
            for (int m = 0; m < ABREAST; m++) {
                const float other_end = __shfl_xor_sync(kAll, h[m][1], 1), odd_end = odd ? h[m][0] : other_end;
                even_end[m] = odd ? other_end : h[m][0];
                end[m] = fmaf(through[m], even_end[m], odd_end), through[m] *= even_decay[m];
            }
#pragma unroll
            for (int m = 0; m < ABREAST; m++) {
                before[m] = take(handed_at + m * channels, turn);
                if (lane < 2) end[m] = fmaf(through[m], before[m], end[m]);
            }
#pragma unroll
            for (int lanes = 2; lanes < 16; lanes *= 2) {
#pragma unroll
                for (int m = 0; m < ABREAST; m++) add_steps_before<true>(end[m], through[m], lanes);
            }
#pragma unroll
            for (int m = 0; m < ABREAST; m++) {
                add_steps_before<false>(end[m], through[m], 16);
                float start = __shfl_up_sync(kAll, end[m], 2);  // before the even lane's steps
                if (lane < 2) start = before[m];
                const float middle = fmaf(even_decay[m], start, even_end[m]);  // before the odd lane's
                h[m][0] = odd ? middle : start;
                h[m][1] = __shfl_xor_sync(kAll, odd ? start : middle, 1);
                if (lane >= 30) hand_on(handed_at + m * channels, end[m], turn + 1);
            }
#pragma unroll
            for (int m = 0; m < ABREAST; m++) {
#pragma unroll
                for (int j = 0; j < kFours; j++) {
                    const float4 four =
                        *reinterpret_cast<const float4*>(b_at + (kAlongStates + m) * M::kRow + j * M::kFour);
                    const float c[4] = {four.x, four.y, four.z, four.w};
                    if (KEEP && 4 * j % (STEPS % 16 ? STEPS % 8 ? 4 : 8 : 16) == 0 && (at + 4 * j) % kSub == 0) {
                        float* const to = kept + (at + 4 * j) / kSub * M::kKeptRow + 2 * pair * kAlongStates + n + m;
                        to[odd * kAlongStates] = h[m][0], to[(1 - odd) * kAlongStates] = h[m][1];
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int t = 4 * j + i;
#pragma unroll
                        for (int k = 0; k < 2; k++) {
                            h[m][k] = fmaf(decay[m][k][t], h[m][k], inflow[m][k][t]);
                            y[k][t] = fmaf(c[i], h[m][k], y[k][t]);
                        }
                    }
                }
            }
            b_at += ABREAST * M::kRow, a_at += ABREAST * 2 * kPairs, handed_at += ABREAST * channels;
        }

        // in place of the pair's delta, which no other warp reads
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            if (GATED) {
                float gate[2];
                turned(mine_at[2 * (2 * M::kTensor + t)], gate[0], gate[1]);
#pragma unroll
                for (int k = 0; k < 2; k++) y[k][t] *= gate[k] * sigmoid<exact>(gate[k]);
            }
            Couple<T> x;
            x.v[0] = from_float<T>(y[0][t]), x.v[1] = from_float<T>(y[1][t]);
            mine_at[2 * t] = swapped_if(odd, x);
        }
        team_barrier(1 + team, kTeamThreads);
        const Four<T>* const from = values_of(turn) + moved * M::kValues;
        T* const to = result + int64_t(begin) * p.dim;
#pragma unroll
        for (int k = 0; k < kTurn / kRowsAtOnce; k++) {
            const int t = moved_row + kRowsAtOnce * k;
            if (t < left && first + 4 * moved < p.dim) *reinterpret_cast<Four<T>*>(to + int64_t(t) * p.dim) = from[t + t / STEPS];
        }
        if (turn == turns - 1) {
            for (int i = thread; i < states * channels; i += kTeamThreads) {
                const int n = i % states, c = i / states;
                if (first + c < p.dim)
                    p.state[(int64_t(image) * p.dim + first + c) * states + n] = take(handed_on + n * channels + c, turns);
            }
        }
        if (KEEP) {
            const int all = (p.length + kSub - 1) / kSub, row = begin / kSub;
            for (int i = thread; i < kTurn / kSub * channels * kAlongStates / 4; i += kTeamThreads) {
                const int n = i * 4 % kAlongStates, c = i * 4 / kAlongStates % channels, r = i * 4 / kAlongStates / channels;
                if (n >= states || first + c >= p.dim || row + r >= all) continue;
                *reinterpret_cast<float4*>(p.saved + ((int64_t(image) * all + row + r) * p.dim + first + c) * states + n) =
                    *reinterpret_cast<const float4*>(kept + r * M::kKeptRow + c * kAlongStates + n);
            }
        }
    }
}

}  // namespace
