"""Policies: random ops of a space, as published and as timm, torchvision and Google have them."""
