"""The teacher's assignment: softmax, Sinkhorn, responsibilities."""
