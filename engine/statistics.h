// Summaries of measured values.
#pragma once

#include <vector>

namespace vesper {

// 0 for no values.
double mean(const std::vector<double>& values);

// The smallest value that at least `share` of all values do not exceed; 0 for no values.
double quantile(std::vector<double> values, double share);

}  // namespace vesper
