G='--device cpu --no-eval --set train.batch_size=2 data.train_images=6 data.val_images=3 train.log_every=1 train.workers=0'
