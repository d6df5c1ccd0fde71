"""A fork that starts its sampler in bfloat16 whatever the plan says; verl imports this in every process."""

import wrapt


def start_in_bfloat16(config):
    planned = config.rollout_config

    def rollout_config(wrapped, rollout, args, kwargs):
        planned(wrapped, rollout, args, kwargs)
        config.force(rollout, dtype="bfloat16")

    config.rollout_config = rollout_config


wrapt.register_post_import_hook(start_in_bfloat16, "fp16_patch.verl.config.settings")
