"""What can be measured on a frozen encoder: one evaluator a file, each a function from Context to Result."""

from varscale.evaluation import knn, linear, linear_cached

EVALUATORS = {
    "knn": knn.run,
    "linear": linear.run,
    "linear-cached": linear_cached.run,
}
