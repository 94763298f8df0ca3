"""Target models, samplers, guidance, classifiers: diffusion without any method or data set."""
