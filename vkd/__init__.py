"""vkd: a benchmark suite for knowledge distillation in vision, built around the alpha-beta divergence.

Nothing heavy is imported here: `import vkd` costs no more than the standard library.
"""

__version__ = "0.1.0"
