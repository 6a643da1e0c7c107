"""How fast training steps are on this machine: vkd's own, the classic loop's, and what the hardware would allow."""
