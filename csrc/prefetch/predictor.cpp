#include "prefetch/predictor.h"

#include "base/error.h"
#include "prefetch/predictors/predictors.h"

namespace moeinf {
namespace {

struct Row {
    std::string_view name;
    std::unique_ptr<Predictor> (*make)(ModelShape, const Collection* from);
};

constexpr Row kPredictors[] = {
    {"previous", make_previous_predictor},
    {"transition", make_transition_predictor},
    {"eam", make_eam_predictor},
};

}  // namespace

std::vector<std::string> predictor_names() {
    std::vector<std::string> names;
    for (const Row& row : kPredictors) names.emplace_back(row.name);
    return names;
}

std::unique_ptr<Predictor> make_predictor(std::string_view name, ModelShape shape,
                                          const Collection* from) {
    if (shape.num_layers < 1 || shape.num_experts < 1) {
        throw Error(ErrorCode::kInvalid, "a predictor needs at least one layer and one expert");
    }
    std::string known;
    for (const Row& row : kPredictors) {
        if (row.name == name) return row.make(shape, from);
        known += (known.empty() ? "" : ", ") + std::string(row.name);
    }
    throw Error(ErrorCode::kInvalid,
                "no predictor is named '" + std::string(name) + "'; there are: " + known);
}

}  // namespace moeinf
