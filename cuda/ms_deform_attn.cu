// Multi-scale deformable attention (Zhu et al. 2021, eq. 3), forward and backward: how the kernels are launched.
//
// No atomics on floats: every sum has a fixed order, so the same inputs give the same bits. Each kernel of the backward may
// start while the one before it ends: it does what needs only the inputs first. Locations are placed in fp32 whatever their
// type is; all sums are fp32.
#include "ms_deform_attn_forward.cuh"
#include "ms_deform_attn_gather.cuh"

namespace {

// `side`: of the tiles of cells, the largest one if `even` is to make those of a map about the same.
Maps describe(const Params& p, int side, bool even) {
    const auto tiles = [&](int extent) { return (extent - 1) / side + 1; };
    const auto tile = [&](int extent) { return even ? (extent - 1) / tiles(extent) + 1 : side; };
    Maps maps = {};
    for (int s = 0; s < p.scales; ++s) {
        const int height = p.shapes[2 * s], width = p.shapes[2 * s + 1];
        maps.height[s] = height, maps.width[s] = width;
        maps.tile_height[s] = tile(height), maps.tile_width[s] = tile(width);
        maps.cell[s + 1] = maps.cell[s] + height * width;
        maps.bin[s + 1] = maps.bin[s] + (height + 1) * (width + 1) + 1;
        maps.tile[s + 1] = maps.tile[s] + ((height - 1) / maps.tile_height[s] + 1) * ((width - 1) / maps.tile_width[s] + 1);
    }
    maps.tiles = maps.tile[p.scales], maps.span = 1;
    maps.per_point = 1.0f / static_cast<float>(p.points);
    return maps;
}

// How `sample` shares the queries among blocks.
Maps by_query(const Params& p) {
    Maps maps = describe(p, 1 << p.query_bits, false);
    if (p.queries != maps.cell[p.scales]) {
        for (int& tile : maps.tile) tile = 0;
        maps.tiles = (p.queries - 1 >> 2 * p.query_bits) + 1;
    }
    if (p.processors) {
        // the fewest parts of a head whose blocks fill nine tenths of the multiprocessors, in as many waves as they take
        const long long pairs = static_cast<long long>(p.batch) * p.heads;
        long long parts = 1;
        while (pairs * parts * 10 < (pairs * parts + p.processors - 1) / p.processors * p.processors * 9) ++parts;
        maps.span = static_cast<int>((maps.tiles + parts - 1) / parts);
    }
    return maps;
}

template <typename T, int V, int kLanes, int kRepeat>
cudaError_t launch_forward(const Params& p, void* stream) {
    const Maps maps = by_query(p);
    const int blocks = (maps.tiles + maps.span - 1) / maps.span;
    const size_t bytes = static_cast<size_t>(p.threads) / kLanes * pitch(p) * (sizeof(int4) + sizeof(float4));
    const unsigned grid = static_cast<unsigned>(static_cast<long long>(p.batch) * p.heads * blocks);
    return MFUSER_LAUNCH((sample<T, V, kLanes, kRepeat>), grid, p.threads, bytes, stream, p, maps);
}

cudaError_t sort(const Params& p, void* stream) {
    const Maps maps = describe(p, p.cell_tile, true);
    if (p.segments < 1 || ((static_cast<long long>(p.queries) << p.point_bits) - 1) / p.segments >= kMaxSegment) {
        return cudaErrorInvalidValue;
    }
    int bins = 1;
    for (int s = 0; s < p.scales; ++s) bins = max(bins, maps.bin[s + 1] - maps.bin[s] - 1);
    const unsigned lists = static_cast<unsigned>(p.batch) * p.heads * p.scales;
    const int window = min(p.window, bins), windows = (bins - 1) / p.window + 1;
    const dim3 by_window(lists * p.segments, windows);
    cudaError_t error = MFUSER_LAUNCH(rank, by_window, p.sort_threads, (window + 32) * sizeof(int), stream, p, maps);
    if (error != cudaSuccess) return error;
    const dim3 by_bins(lists * ((window - 1) / kOffsetThreads + 1), windows);
    error = MFUSER_LAUNCH_NEXT(offset, by_bins, kOffsetThreads, 0, stream, p, maps);
    if (error != cudaSuccess) return error;
    const long long longest = ((static_cast<long long>(p.queries) << p.point_bits) - 1) / p.segments + 1;
    const dim3 by_points(lists * p.segments, static_cast<unsigned>((longest - 1) / (kScatterThreads * kMoved) + 1));
    return MFUSER_LAUNCH_NEXT(scatter, by_points, kScatterThreads, 0, stream, p, maps);
}

template <typename T, int V, int kLanes, int kRepeat>
cudaError_t launch_backward(const Params& p, void* stream) {
    const Maps maps = describe(p, p.cell_tile, true);
    const Layout<T, kLanes * V * kRepeat> layout(p.cell_tile, p.gather_threads, kLanes);
    if (p.gather_threads > gather_threads(V * kRepeat)) return cudaErrorInvalidValue;
    const unsigned grid = static_cast<unsigned>(static_cast<long long>(p.batch) * p.heads * maps.tile[p.scales]);
    return MFUSER_LAUNCH_NEXT((gather<T, V, kLanes, kRepeat>), grid, p.gather_threads, static_cast<size_t>(layout.bytes), stream,
                              p, maps);
}

template <typename T>
bool in_pieces(const void* pointer, const long long (&stride)[3]) {
    bool pieces = reinterpret_cast<size_t>(pointer) % 16 == 0;
    for (long long step : stride) pieces = pieces && step * static_cast<long long>(sizeof(T)) % 16 == 0;
    return pieces;
}

template <typename T>
cudaError_t choose(const Params& p, bool forward, void* stream) {
    constexpr int V = 16 / sizeof(T);
    const long long contiguous[3] = {p.dim, p.dim, p.dim};
    // of the pointers that this direction does not have, null passes
    const bool aligned = in_pieces<T>(p.value, p.value_stride) && in_pieces<T>(p.dvalue, p.dvalue_stride) &&
                         in_pieces<T>(p.out, contiguous) && in_pieces<T>(p.dout, contiguous);
    if (forward) {
        if (!aligned) return launch_forward<T, 1, 32, 1>(p, stream);
        if (p.dim <= 4 * V) return launch_forward<T, V, 4, 1>(p, stream);
        if (p.repeat == 2) return launch_forward<T, V, 4, 2>(p, stream);
        return launch_forward<T, V, 8, 1>(p, stream);
    }
    cudaError_t error = sort(p, stream);
    if (error != cudaSuccess) return error;
    if (!aligned) return launch_backward<T, 1, 32, 1>(p, stream);
    if (p.dim <= 16) return launch_backward<T, 4, 4, 1>(p, stream);
    if (p.gather_channels == 8) return launch_backward<T, V, 4, 8 / V>(p, stream);
    return launch_backward<T, 4, 8, 1>(p, stream);
}

cudaError_t run(const Params& p, bool forward, void* stream) {
    if (p.scales < 1 || p.scales > kMaxScales || p.threads > kMaxThreads ||
        p.sort_threads > kSortThreads || p.window < 1) {
        return cudaErrorInvalidValue;
    }
    const long long row_bytes = max(p.value_stride[1], static_cast<long long>(p.heads) * p.dim) * 4;
    if (p.location_type == kFloat32 && reinterpret_cast<size_t>(p.locations) % 8 != 0) return cudaErrorInvalidValue;
    if ((static_cast<long long>(p.queries) << p.point_bits) > INT_MAX || row_bytes > UINT_MAX) return cudaErrorInvalidValue;
    switch (p.value_type) {
        case kFloat32: return choose<float>(p, forward, stream);
        case kBFloat16: return choose<bf16>(p, forward, stream);
        case kFloat16: return choose<fp16>(p, forward, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

MFUSER_EXPORT(mfuser_ms_deform_attn_fwd, MsDeformAttnParams) { return run(*params, true, stream); }
MFUSER_EXPORT(mfuser_ms_deform_attn_bwd, MsDeformAttnParams) { return run(*params, false, stream); }
