"""The DC-AE of Sana, diffusers' AutoencoderDC."""
