// Multi-scale deformable attention, backward, second part: in `gather` a block owns a tile of cells and groups of lanes share the
// points of all base cells that reach into the tile evenly. A group keeps the values of its base cell's four neighbours and the
// sums of dout over the points, once per neighbour; a row of dout, read once, gives both the gradients of values and, by its
// inner products with the neighbours, those of the point's weight and location. At last the four sums that meet in a cell are
// added.
#pragma once
#include "ms_deform_attn_sort.cuh"

namespace {

constexpr int gather_threads(int channels) { return channels == 8 ? 256 : 384; }  // of a block, two of which share a processor
constexpr int kBatch = 4;  // rows under way for a lane

// The sums of four numbers over a group of lanes, one each: lane l gets that of number l / (kLanes / 4).
template <int kLanes>
__device__ __forceinline__ float sum_each(const float (&x)[4], int own) {
    const bool second = own & kLanes / 2, odd = own & kLanes / 4;
    float a = second ? x[2] : x[0], b = second ? x[3] : x[1];
    a += __shfl_xor_sync(kAll, second ? x[0] : x[2], kLanes / 2);
    b += __shfl_xor_sync(kAll, second ? x[1] : x[3], kLanes / 2);
    float sum = (odd ? b : a) + __shfl_xor_sync(kAll, odd ? a : b, kLanes / 4);
#pragma unroll
    for (int lanes = kLanes / 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
    return sum;
}

// The shared memory of `gather`, in bytes from its first on; `side` is that of the largest tile.
template <typename T, int kWidth>
struct Layout {
    int sums, parts, inner, entries, values, sources, starts, shifts, rows, bytes;

    __host__ __device__ Layout(int side, int threads, int lanes) {
        const int bases = (side + 1) * (side + 1), cells = (side + 2) * (side + 2);
        sums = 0;  // (bases + groups, 4, kWidth): what the points of a base cell bring to its four neighbours
        parts = sums + (bases + threads / lanes) * 4 * kWidth * 4;  // (threads,) of 16 bytes
        inner = parts + threads * 16;                               // the same
        entries = inner + threads * 16;                             // the same
        values = entries + threads * 16;                            // (cells, kWidth)
        sources = values + (cells * kWidth * static_cast<int>(sizeof(T)) + 15) / 16 * 16;  // (threads,) of 8 bytes
        starts = sources + threads * 8;                                                     // (bases + 1,)
        shifts = starts + (bases + 1) * 4;                                                  // (bases,)
        rows = shifts + bases * 4;                                                          // (bases,)
        bytes = rows + bases * 4;
    }
};

// All gradients: a block has a tile of cells of one head.
template <typename T, int V, int kLanes, int kRepeat>
__global__ void __launch_bounds__(gather_threads(V * kRepeat), 2) gather(const Params p, const Maps maps) {
    constexpr int kStep = kLanes * V, kWidth = kStep * kRepeat;
    MFUSER_SHARED(shared);
    const Layout<T, kWidth> layout(p.cell_tile, blockDim.x, kLanes);
    float* sums = reinterpret_cast<float*>(shared + layout.sums);
    float4* parts = reinterpret_cast<float4*>(shared + layout.parts);
    float4* inner = reinterpret_cast<float4*>(shared + layout.inner);
    Entry* kept = reinterpret_cast<Entry*>(shared + layout.entries);  // for later: registers are scarce
    T* values = reinterpret_cast<T*>(shared + layout.values);
    int2* sources = reinterpret_cast<int2*>(shared + layout.sources);  // of each point: its query and its base cell
    int* starts = reinterpret_cast<int*>(shared + layout.starts);      // of the base cells' points in the tile's list
    int* shifts = reinterpret_cast<int*>(shared + layout.shifts);      // from there to the place among the entries
    int* row_of = reinterpret_cast<int*>(shared + layout.rows);        // of a base cell
    const int own = threadIdx.x % kLanes, group = threadIdx.x / kLanes, groups = blockDim.x / kLanes;
    const int here = threadIdx.x - own;

    const unsigned pairs = static_cast<unsigned>(p.batch) * p.heads;
    const long long image_head = blockIdx.x % pairs, image = image_head / p.heads, head = image_head % p.heads;
    // the smallest map has the longest lists: these blocks come first, whether it is the first map or the last
    const int index = blockIdx.x / pairs, tiles = maps.tile[p.scales];
    const Tile tile = find_tile(maps, maps.cell[1] <= maps.cell[p.scales] - maps.cell[p.scales - 1] ? index : tiles - 1 - index);
    const int height = maps.height[tile.scale], width = maps.width[tile.scale];
    const int rows = min(maps.tile_height[tile.scale], height - tile.row);
    const int columns = min(maps.tile_width[tile.scale], width - tile.column);
    // base cells are counted from the one before the tile's first, in each direction; so are the cells of `values`, of
    // which a row has one more: base cell b has its neighbours at b + row_of[b] and 1, pitch + 1 and pitch + 2 from there
    const int pitch = columns + 1, bases = (rows + 1) * pitch, targets = rows * columns;
    const T* value = static_cast<const T*>(p.value) + image * p.value_stride[0] + head * p.value_stride[2];
    using Piece = Raw<T, V>;
    const auto load_values = [&](int start, int first, int step) {
        for (int i = first; i < (rows + 2) * (columns + 2) * kLanes * kRepeat; i += step) {
            const int cell = i / (kLanes * kRepeat), offset = i % (kLanes * kRepeat) * V;
            // a neighbour off the map has some cell of the map instead
            const int row = min(max(tile.row - 1 + cell / (columns + 2), 0), height - 1);
            const int column = min(max(tile.column - 1 + cell % (columns + 2), 0), width - 1);
            const long long at = maps.cell[tile.scale] + row * width + column;
            const T* from = value + at * p.value_stride[1] + start + offset;
            Piece* to = reinterpret_cast<Piece*>(values + cell * kWidth + offset);
            if (start + offset >= p.dim) {
                *to = Piece{};
            } else if constexpr (sizeof(Piece) >= 4) {
                copy_async<sizeof(Piece)>(to, from);
            } else {
                *to = *reinterpret_cast<const Piece*>(from);
            }
        }
        copies_done();
    };

    // While the first warps find the points, the others bring the values.
    const int finders = blockDim.x > 128 ? 96 : blockDim.x > 32 ? 32 : 0, thread = threadIdx.x;
    if (thread >= finders) load_values(0, thread - finders, blockDim.x - finders);
    after_launch_before();
    if (thread < finders || finders == 0) {
        // a row of base cells is a run of the entries, and the tile's list is these runs, one after the other
        constexpr int kLoads = 8;
        const int* all = p.starts + image_head * maps.bin[p.scales] + maps.bin[tile.scale];
        for (int i = thread; i <= bases; i += finders ? finders : blockDim.x) {
            const int row = i / pitch;
            int before = 0;
            for (int r = 0; r < row; r += kLoads) {
#pragma unroll
                for (int k = 0; k < kLoads; ++k) {
                    const int* run = all + (tile.row + r + k) * (width + 1) + tile.column;
                    if (r + k < row) before += run[pitch] - run[0];
                }
            }
            if (i < bases) {
                const int* run = all + (tile.row + row) * (width + 1) + tile.column;
                row_of[i] = row;
                shifts[i] = run[0] - before;
                before += run[i - row * pitch] - run[0];
            }
            starts[i] = before;
        }
    }
    __syncthreads();
    const int points = starts[bases], share = (points + groups - 1) / groups;
    const int begin = min(group * share, points), end = min(begin + share, points);
    const Entry* entries =
        static_cast<const Entry*>(p.entries) + ((image_head * p.scales + tile.scale) * p.queries << p.point_bits);
    const unsigned row_bytes = static_cast<unsigned>(p.heads) * p.dim * static_cast<unsigned>(sizeof(T));
    const T* dout = static_cast<const T*>(p.dout) + (image * p.queries * p.heads + head) * p.dim;
    T* dvalue = static_cast<T*>(p.dvalue) + image * p.dvalue_stride[0] + head * p.dvalue_stride[2];

    for (int start = 0; start < p.dim; start += kWidth) {
        if (start > 0) {
            load_values(start, threadIdx.x, blockDim.x);
            __syncthreads();
        }

        const char* dout_rows[kRepeat];
        bool real[kRepeat];  // channels
#pragma unroll
        for (int r = 0; r < kRepeat; ++r) {
            const int channel = start + r * kStep + own * V;
            real[r] = channel < p.dim;
            dout_rows[r] = reinterpret_cast<const char*>(dout + (real[r] ? channel : 0));
        }
        float sum[4][kRepeat][V] = {}, corner[4][kRepeat][V] = {};
        int base = -1;  // that of these sums
        // A base cell's points are the work of one group or of several in a row; all but the first have a place of their own.
        const auto flush = [&] {
            float* to = sums + (starts[base] < begin ? bases + group : base) * (4 * kWidth) + own * V;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int r = 0; r < kRepeat; ++r) {
                    store<V, float>(to + c * kWidth + r * kStep, sum[c][r]);
#pragma unroll
                    for (int v = 0; v < V; ++v) sum[c][r][v] = 0.0f;
                }
            }
        };
        const auto load_corners = [&] {
            const T* upper = values + (base + row_of[base]) * kWidth + own * V;
            const T* lower = upper + (columns + 2) * kWidth;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int r = 0; r < kRepeat; ++r) {
                    load<V, T>((c < 2 ? upper : lower) + c % 2 * kWidth + r * kStep, corner[c][r]);
                }
            }
        };

        int at = 0;  // the base cell of the lane's next point
        for (int past = bases; past - at > 1;) {
            const int middle = (at + past) / 2;
            (starts[middle] <= begin ? at : past) = middle;
        }
        Entry next = {0, 0.0f, 0.0f, 0.0f};
        const auto look_ahead = [&](int i) {
            if (i >= end) return;
            while (starts[at + 1] <= i) ++at;
            next = entries[shifts[at] + i];
        };
        look_ahead(begin + own);
        // The row of a point is under way while those of the batch before it are in use. Behind the group's last point there is
        // some point from before, whose row is not used.
        Piece pieces[kBatch][kRepeat];
        const auto bring = [&](int k, int query) {
#pragma unroll
            for (int r = 0; r < kRepeat; ++r) {
                pieces[k][r] = *reinterpret_cast<const Piece*>(row_at(dout_rows[r], query, row_bytes));
            }
        };
        const auto bring_next = [&](int k) { bring(k, __shfl_sync(kAll, next.source >> p.point_bits, here % 32 + k)); };
#pragma unroll
        for (int k = 0; k < kBatch; ++k) bring_next(k);
        for (int done = 0; done < share; done += kLanes) {
            const int count = end - begin - done;
            __syncwarp();
            parts[threadIdx.x] = shares({0, 0, next.y, next.x, true}, next.weight);
            sources[threadIdx.x] = make_int2(next.source >> p.point_bits, at);
            kept[threadIdx.x] = next;
            look_ahead(begin + done + kLanes + own);
            __syncwarp();
            const int steps = min(kLanes, share - done);
            const int live = real[0] ? count : 0;
            for (int first = 0; first < steps; first += kBatch) {
                int next_base[kBatch];
#pragma unroll
                for (int k = 0; k < kBatch; ++k) next_base[k] = sources[here + first + k].y;
#pragma unroll
                for (int k = 0; k < kBatch; ++k) {
                    if (first + k >= steps) break;
                    float product[4] = {};
                    if (first + k < live) {
                        if (next_base[k] != base) {
                            if (base >= 0) flush();
                            base = next_base[k];
                            load_corners();
                        }
                        const float4 part = parts[here + first + k];
#pragma unroll
                        for (int r = 0; r < kRepeat; ++r) {
                            if (r > 0 && !real[r]) break;
                            float x[V];
                            widen(Bits<V, T>{pieces[k][r]}.pack, x);
#pragma unroll
                            for (int v = 0; v < V; ++v) {
                                sum[0][r][v] = fmaf(part.x, x[v], sum[0][r][v]);
                                sum[1][r][v] = fmaf(part.y, x[v], sum[1][r][v]);
                                sum[2][r][v] = fmaf(part.z, x[v], sum[2][r][v]);
                                sum[3][r][v] = fmaf(part.w, x[v], sum[3][r][v]);
#pragma unroll
                                for (int c = 0; c < 4; ++c) product[c] = fmaf(corner[c][r][v], x[v], product[c]);
                            }
                        }
                    }
                    if (first + kBatch < steps) {
                        bring(k, sources[here + first + kBatch + k].x);
                    } else if (done + kLanes < share) {
                        bring_next(k);
                    }
                    const float total = sum_each<kLanes>(product, own);
                    if (own % (kLanes / 4) == 0) reinterpret_cast<float*>(inner + here + first + k)[own / (kLanes / 4)] = total;
                }
            }
            __syncwarp();
            const Entry entry = kept[threadIdx.x];
            const int at = sources[threadIdx.x].y, down = row_of[at], along = at - down * pitch;
            // points of the base cells before the tile are the work of the tile that these are in, if there is one
            if (own < count && (down > 0 || tile.row == 0) && (along > 0 || tile.column == 0)) {
                const bool top = tile.row + down > 0, bottom = tile.row + down < height;
                const bool left = tile.column + along > 0, right = tile.column + along < width;
                const float4 product = inner[threadIdx.x];
                const float upper_left = top && left ? product.x : 0.0f, upper_right = top && right ? product.y : 0.0f;
                const float lower_left = bottom && left ? product.z : 0.0f, lower_right = bottom && right ? product.w : 0.0f;
                const float upper = fmaf(entry.x, upper_right - upper_left, upper_left);
                const float lower = fmaf(entry.x, lower_right - lower_left, lower_left);
                const float across = (1.0f - entry.y) * (upper_right - upper_left) + entry.y * (lower_right - lower_left);
                const int query = entry.source >> p.point_bits, point = entry.source & ((1 << p.point_bits) - 1);
                const long long row = (image * p.queries + query) * p.heads + head;
                const long long index = (row * p.scales + tile.scale) * p.points + point;
                float dweight = (1.0f - entry.y) * upper + entry.y * lower;
                float2 dlocation = make_float2(entry.weight * static_cast<float>(width) * across,
                                               entry.weight * static_cast<float>(height) * (lower - upper));
                float2* to = reinterpret_cast<float2*>(p.dlocations) + index;
                if (start > 0) {
                    dweight += p.dweights[index];
                    dlocation = make_float2(dlocation.x + to->x, dlocation.y + to->y);
                }
                p.dweights[index] = dweight;
                *to = dlocation;
            }
        }
        if (base >= 0) flush();
        __syncthreads();

        for (int i = threadIdx.x; i < targets * kLanes * kRepeat; i += blockDim.x) {
            const int target = i / (kLanes * kRepeat), offset = i % (kLanes * kRepeat) * V;
            if (start + offset >= p.dim) continue;
            const int row = target / columns, column = target % columns;
            float total[V] = {};
            const auto add = [&](const float* from) {
                float x[V];
                load<V, float>(from + offset, x);
#pragma unroll
                for (int v = 0; v < V; ++v) total[v] += x[v];
            };
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int base = (row + 1 - c / 2) * pitch + column + 1 - c % 2, first = starts[base], past = starts[base + 1];
                if (first == past) continue;
                add(sums + (base * 4 + c) * kWidth);
#pragma unroll 1
                for (int g = first / share + 1; g * share < past; ++g) add(sums + ((bases + g) * 4 + c) * kWidth);
            }
            const long long cell = maps.cell[tile.scale] + (tile.row + row) * width + tile.column + column;
            T* to = dvalue + cell * p.dvalue_stride[1] + start + offset;
            if constexpr (sizeof(T) == 2 && V % 2 == 0) {
                Piece piece;
#pragma unroll
                for (int v = 0; v < V; v += 2) {
                    Bits<2, T> pair{};
                    pair.pack.x[0] = from_float<T>(total[v]), pair.pack.x[1] = from_float<T>(total[v + 1]);
                    piece.x[v / 2] = pair.raw.x[0];
                }
                *reinterpret_cast<Piece*>(to) = piece;
            } else {
                store<V, T>(to, total);
            }
        }
        __syncthreads();
    }
}

}  // namespace
