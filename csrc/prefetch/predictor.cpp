#include "prefetch/predictor.h"

#include "base/error.h"

namespace moeinf {

// A new predictor is one file in predictors/, one line here, and one row below.
using MakePredictor = std::unique_ptr<Predictor>(ModelShape shape, const Collection* from);
MakePredictor make_previous_predictor, make_transition_predictor, make_eam_predictor;

namespace {

constexpr struct {
    std::string_view name;
    MakePredictor* make;
} kPredictors[] = {
    {"previous", make_previous_predictor},
    {"transition", make_transition_predictor},
    {"eam", make_eam_predictor},
};

}  // namespace

std::vector<std::string> predictor_names() {
    std::vector<std::string> names;
    for (const auto& row : kPredictors) names.emplace_back(row.name);
    return names;
}

std::vector<std::string> prefetch_names() {
    std::vector<std::string> names = predictor_names();
    names.insert(names.begin(), "off");
    names.emplace_back("external");
    return names;
}

std::unique_ptr<Predictor> make_predictor(std::string_view name, ModelShape shape,
                                          const Collection* from) {
    if (shape.num_layers < 1 || shape.num_experts < 1) {
        throw Error(ErrorCode::kInvalid, "a predictor needs at least one layer and one expert");
    }
    std::string known;
    for (const auto& row : kPredictors) {
        if (row.name == name) return row.make(shape, from);
    }
    for (const std::string& one : prefetch_names()) known += (known.empty() ? "" : ", ") + one;
    throw Error(ErrorCode::kInvalid,
                "no prefetch is named '" + std::string(name) + "'; there are: " + known);
}

}  // namespace moeinf
