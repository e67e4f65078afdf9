"""The autoencoders of Stable Diffusion and FLUX, diffusers' AutoencoderKL."""
