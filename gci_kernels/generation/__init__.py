"""What layers know of a forward: sequences, masks, caches; and what adapters keep beside a cache."""
