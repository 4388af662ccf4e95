"""Token shards, scores and selections with numpy only."""
