"""From records to text and pictures: pure functions that import neither torch nor diffusers."""
