"""DeiT III in timm's layout."""
