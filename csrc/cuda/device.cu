// Whether a GPU runs the kernels of this binary. Its driver must know the CUDA runtime that is linked in, and the binary
// must hold machine code or PTX for it: an empty kernel, compiled as all others are, answers for them.
#include "launch.cuh"

namespace flowbp {

__global__ void probe() {}

CudaVerdict cuda_verdict() {
  CudaVerdict verdict = {};
  cudaDriverGetVersion(&verdict.driver);
  cudaRuntimeGetVersion(&verdict.runtime);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error != cudaSuccess) {
    cudaGetLastError();  // the question is answered; the next launch must not find this error
    verdict.error = cudaGetErrorString(error);
  }
  return verdict;
}

}  // namespace flowbp
