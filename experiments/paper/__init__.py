"""The paper's tables, figures and claims at two scales; `experiments.paper.run` makes them all."""
