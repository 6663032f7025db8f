"""Side Plugin Adaption (SPA) in JAX: a frozen LLaMA in the cloud, a personal side plugin on the device."""
