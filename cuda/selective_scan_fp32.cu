#include "selective_scan.cuh"

MFUSER_EXPORT(mfuser_selective_scan_forward_fp32, ScanParams) { return forward_any<float>(*params, stream); }
MFUSER_EXPORT(mfuser_selective_scan_backward_fp32, ScanParams) { return backward_any<float>(*params, stream); }
