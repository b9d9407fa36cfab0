"""Eight host devices, so that sharded trees are tested everywhere."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
