#include "bindings/python_policy.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/arrays.h"
#include "bindings/ids.h"
#include "policy/lowest_scores.h"

namespace py = pybind11;

namespace moeinf {
namespace {

py::array_t<int32_t> numbers(std::span<const ExpertId> experts) {
    py::array_t<int32_t> out(static_cast<py::ssize_t>(experts.size()));
    std::ranges::transform(experts, out.mutable_data(), number<ExpertId>);
    return out;
}

class PythonPolicy final : public Policy {
public:
    explicit PythonPolicy(py::object policy) : policy_(std::move(policy)) {}
    ~PythonPolicy() override {
        py::gil_scoped_acquire gil;
        policy_ = py::object();
    }
    PythonPolicy(const PythonPolicy&) = delete;
    PythonPolicy& operator=(const PythonPolicy&) = delete;

    std::string_view name() const noexcept override { return "python"; }

    void observe(const Step& step) override {
        py::gil_scoped_acquire gil;
        py::dict seen;
        seen["index"] = step.index;
        seen["layer"] = step.layer;
        seen["experts"] = numbers(step.experts);
        seen["counts"] = copied(step.counts);
        seen["router"] = step.router.empty() ? py::object(py::none()) : copied(step.router);
        seen["prefill"] = step.prefill;
        seen["new_sequence"] = step.new_sequence;
        policy_.attr("observe")(py::module_::import("types").attr("SimpleNamespace")(**seen));
    }

    size_t choose_victims(std::span<const ExpertId> residents, const Pins& pins,
                          std::span<ExpertId> victims) override {
        candidates_.clear();
        for (const ExpertId expert : residents) {
            if (is_some(expert) && pins[expert] == 0) candidates_.push_back(expert);
        }
        py::gil_scoped_acquire gil;
        const auto scores = py::array_t<double, py::array::c_style | py::array::forcecast>(
            policy_.attr("score")(numbers(candidates_)));
        if (scores.ndim() != 1 || scores.size() != static_cast<py::ssize_t>(candidates_.size())) {
            throw Error(ErrorCode::kInvalid,
                        "score() of the policy: expected one value for each of " +
                            std::to_string(candidates_.size()) + " residents, found " +
                            std::to_string(scores.size()) + " in " + std::to_string(scores.ndim()) +
                            " dimensions");
        }
        const double* next = scores.data();
        const auto score_of = [&next](ExpertId expert) {
            const double score = *next++;
            if (!std::isnan(score)) return score;
            throw Error(ErrorCode::kInvalid,
                        "score() of the policy: expected numbers, found NaN for expert " +
                            std::to_string(number(expert)));
        };
        return lowest_scores(candidates_, pins, score_of, scored_, victims);
    }

private:
    py::object policy_;
    std::vector<ExpertId> candidates_;
    ScoredExperts<double> scored_;
};

}  // namespace

std::unique_ptr<Policy> make_python_policy(py::object policy) {
    return std::make_unique<PythonPolicy>(std::move(policy));
}

}  // namespace moeinf
