#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bind.h"
#include "index_propagation.h"

namespace py = pybind11;

namespace {

titok::IndexPropagationArgs common_args(std::uintptr_t z, int64_t z_stride, std::uintptr_t codebook,
                                        int64_t codebook_stride, int64_t n, int64_t k, int64_t d,
                                        const std::string& dtype, float temperature, bool entropy,
                                        std::uintptr_t indices, std::uintptr_t mean_code,
                                        std::uintptr_t statistics, std::uintptr_t support_codes,
                                        std::uintptr_t support_weights, int64_t support,
                                        std::uintptr_t workspace, int threads) {
  titok::IndexPropagationArgs args{};
  args.z = titok::pointer<const void>(z);
  args.codebook = titok::pointer<const void>(codebook);
  args.z_stride = z_stride;
  args.codebook_stride = codebook_stride;
  args.n = n;
  args.k = k;
  args.d = d;
  args.dtype = titok::parse_dtype(dtype);
  args.temperature = temperature;
  args.entropy = entropy;
  args.indices = titok::pointer<int64_t>(indices);
  args.mean_code = titok::pointer<float>(mean_code);
  args.statistics = titok::pointer<float>(statistics);
  args.support_codes = titok::pointer<int32_t>(support_codes);
  args.support_weights = titok::pointer<double>(support_weights);
  args.support = support;
  args.workspace = titok::pointer<void>(workspace);
  args.threads = threads;
  return args;
}

}  // namespace

void bind_index_propagation(py::module_& m) {
  m.def(
      "index_propagation_cpu_workspace",
      [](int64_t n, int64_t k, int64_t d, const std::string& dtype, int threads, bool backward) {
        return titok::index_propagation_cpu_workspace(n, k, d, titok::parse_dtype(dtype), threads,
                                                      backward);
      },
      py::arg("n"), py::arg("k"), py::arg("d"), py::arg("dtype"), py::arg("threads"),
      py::arg("backward"));
  m.def(
      "index_propagation_fwd_cpu",
      [](std::uintptr_t z, int64_t z_stride, std::uintptr_t codebook, int64_t codebook_stride,
         int64_t n, int64_t k, int64_t d, const std::string& dtype, float temperature, bool entropy,
         std::uintptr_t indices, std::uintptr_t mean_code, std::uintptr_t statistics,
         std::uintptr_t code_probability, std::uintptr_t support_codes,
         std::uintptr_t support_weights, int64_t support, std::uintptr_t workspace, int threads) {
        auto args = common_args(z, z_stride, codebook, codebook_stride, n, k, d, dtype, temperature,
                                entropy, indices, mean_code, statistics, support_codes,
                                support_weights, support, workspace, threads);
        args.code_probability = titok::pointer<double>(code_probability);
        py::gil_scoped_release release;
        titok::index_propagation_fwd_cpu(args);
      },
      py::arg("z"), py::arg("z_stride"), py::arg("codebook"), py::arg("codebook_stride"),
      py::arg("n"), py::arg("k"), py::arg("d"), py::arg("dtype"), py::arg("temperature"),
      py::arg("entropy"), py::arg("indices"), py::arg("mean_code"), py::arg("statistics"),
      py::arg("code_probability"), py::arg("support_codes"), py::arg("support_weights"),
      py::arg("support"), py::arg("workspace"), py::arg("threads"));
  m.def(
      "index_propagation_bwd_cpu",
      [](std::uintptr_t grad, std::uintptr_t z, int64_t z_stride, std::uintptr_t codebook,
         int64_t codebook_stride, int64_t n, int64_t k, int64_t d, const std::string& dtype,
         float temperature, bool entropy, std::uintptr_t indices, std::uintptr_t mean_code,
         std::uintptr_t statistics, std::uintptr_t support_codes, std::uintptr_t support_weights,
         int64_t support, double sample_weight, std::uintptr_t code_weight, std::uintptr_t grad_z,
         std::uintptr_t grad_codebook, std::uintptr_t workspace, int threads) {
        auto args = common_args(z, z_stride, codebook, codebook_stride, n, k, d, dtype, temperature,
                                entropy, indices, mean_code, statistics, support_codes,
                                support_weights, support, workspace, threads);
        args.grad = titok::pointer<const float>(grad);
        args.sample_weight = sample_weight;
        args.code_weight = titok::pointer<const double>(code_weight);
        args.grad_z = titok::pointer<void>(grad_z);
        args.grad_codebook = titok::pointer<void>(grad_codebook);
        py::gil_scoped_release release;
        titok::index_propagation_bwd_cpu(args);
      },
      py::arg("grad"), py::arg("z"), py::arg("z_stride"), py::arg("codebook"),
      py::arg("codebook_stride"), py::arg("n"), py::arg("k"), py::arg("d"), py::arg("dtype"),
      py::arg("temperature"), py::arg("entropy"), py::arg("indices"), py::arg("mean_code"),
      py::arg("statistics"), py::arg("support_codes"), py::arg("support_weights"),
      py::arg("support"), py::arg("sample_weight"), py::arg("code_weight"), py::arg("grad_z"),
      py::arg("grad_codebook"), py::arg("workspace"), py::arg("threads"));
}
