"""What a job will take before it runs: `graphbuild plan`, and `--dry-run` of the verbs that build."""

from graphbuild.plan.show import plan_recipe, plan_verb

__all__ = ["plan_recipe", "plan_verb"]
