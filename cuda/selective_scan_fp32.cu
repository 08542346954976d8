#include "selective_scan.cuh"

MFUSER_EXPORT(mfuser_selective_scan_fwd_fp32, ScanParams) { return forward_any<float>(*params, stream); }
MFUSER_EXPORT(mfuser_selective_scan_bwd_fp32, ScanParams) { return backward_any<float>(*params, stream); }
